"""What makes a network smaller or faster and leaves its results as they are."""

import logging

import diffusers

from lcm.errors import first_line

logger = logging.getLogger(__name__)



def enable_memory_savers(args, accelerator, networks):
    """Gradient checkpointing for the student and, where it can be had, xformers' attention for all."""
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
            except Exception as error:  # built for another torch or GPU: diffusers' trial of it fails
                for network in networks.networks:
                    network.disable_xformers_memory_efficient_attention()
                logger.warning("--enable_xformers_memory_efficient_attention: %s; using PyTorch's", first_line(error))
