"""Options that make networks smaller or faster and do not change their results."""

import logging

import diffusers
from accelerate import Accelerator

from lcm.errors import first_line
from lcm.models.networks import Networks
from lcm.options.types import Options

logger = logging.getLogger(__name__)


def enable_memory_savers(args: Options, accelerator: Accelerator, networks: Networks) -> None:
    """Enable gradient checkpointing for the student, and xformers' attention, where it works, for all networks."""
    if args.gradient_checkpointing:
        networks.student.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        if accelerator.device.type != "cuda" or not diffusers.utils.is_xformers_available():
            logger.warning(
                "--enable_xformers_memory_efficient_attention: needs xformers and CUDA; using PyTorch's own attention"
            )
        else:
            try:
                for network in networks.networks:
                    network.enable_xformers_memory_efficient_attention()
            except Exception as error:  # built for another torch or GPU: diffusers tries it and fails
                for network in networks.networks:
                    network.disable_xformers_memory_efficient_attention()
                logger.warning("--enable_xformers_memory_efficient_attention: %s; using PyTorch's", first_line(error))
