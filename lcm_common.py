"""The mathematics of latent consistency distillation: functions on tensors, computed in float32.

Shapes: B samples, T training timesteps of the noise schedule (1000), N points of the solver's grid.
Latents are (B, C, h, w); timesteps `t` are (B,) int64 in [0, T); `alphas` and `sigmas` are (T,) float32 with
alphas^2 + sigmas^2 = 1. For inputs of any float dtype, every function here computes and returns float32.

Algorithm 1 and its symbols: Luo et al., "Latent Consistency Models", arXiv 2310.04378.
"""

import torch

Tensor = torch.Tensor


def noise_schedule(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """alphas(t) = sqrt(alphas_cumprod), sigmas(t) = sqrt(1 - alphas_cumprod).

    `alphas_cumprod` is (T,), as in a diffusers scheduler. Returns two (T,) float32 tensors.
    """
    alphas_cumprod = alphas_cumprod.float()
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Row `t` of a (T,) table for each sample, as (B, 1, ..., 1) float32 with as many dimensions as `like`."""
    return table.float()[t].reshape(-1, *[1] * (like.ndim - 1))


def add_noise(z_0: Tensor, noise: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
    """z_t = alpha(t) z_0 + sigma(t) noise. In bfloat16 the noise level near t = 0 would have an error of percents.

    `z_0` and `noise` are (B, C, h, w) of any float dtype. Returns (B, C, h, w) float32.
    """
    return gather(alphas, t, z_0) * z_0.float() + gather(sigmas, t, z_0) * noise.float()


def predicted_origin(
    output: Tensor, t: Tensor, z_t: Tensor, alphas: Tensor, sigmas: Tensor, prediction_type: str
) -> Tensor:
    """The clean latent x_0 that a network's `output` at (z_t, t) predicts.

    epsilon: (z_t - sigma output) / alpha; sample: output; v_prediction: alpha z_t - sigma output.
    `output` and `z_t` are (B, C, h, w). Returns (B, C, h, w) float32. For epsilon, alpha(t) must not be 0, as it
    is at the end of a schedule with zero terminal SNR. Raises ValueError for another `prediction_type`.
    Matches step 4 of diffusers' `LCMScheduler.step`.
    """
    output, z_t = output.float(), z_t.float()
    alpha_t, sigma_t = gather(alphas, t, z_t), gather(sigmas, t, z_t)
    if prediction_type == "epsilon":
        return (z_t - sigma_t * output) / alpha_t
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return alpha_t * z_t - sigma_t * output
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed: epsilon, sample, v_prediction")


def predicted_noise(
    output: Tensor, t: Tensor, z_t: Tensor, alphas: Tensor, sigmas: Tensor, prediction_type: str
) -> Tensor:
    """The noise eps that a network's `output` at (z_t, t) predicts.

    epsilon: output; sample: (z_t - alpha output) / sigma; v_prediction: alpha output + sigma z_t.
    Shapes, dtype and errors as `predicted_origin`. Matches the predicted epsilon in diffusers' `DDIMScheduler.step`.
    """
    output, z_t = output.float(), z_t.float()
    alpha_t, sigma_t = gather(alphas, t, z_t), gather(sigmas, t, z_t)
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return (z_t - alpha_t * output) / sigma_t
    if prediction_type == "v_prediction":
        return alpha_t * output + sigma_t * z_t
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed: epsilon, sample, v_prediction")


def boundary_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip = sigma_data^2 / ((s t)^2 + sigma_data^2) and c_out = s t / sqrt((s t)^2 + sigma_data^2).

    `t` is (B,), `timestep_scaling` is s. Returns (c_skip, c_out), each (B,) float32; at t = 0 they are exactly
    1 and 0, which makes f(z, 0) = z. Matches `LCMScheduler.get_scalings_for_boundary_condition_discrete`.
    """
    scaled_t = timestep_scaling * t.float()
    c_skip = sigma_data**2 / (scaled_t**2 + sigma_data**2)
    c_out = scaled_t / (scaled_t**2 + sigma_data**2).sqrt()
    return c_skip, c_out


def consistency_function(
    output: Tensor,
    t: Tensor,
    z_t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    prediction_type: str,
    timestep_scaling: float = 10.0,
) -> Tensor:
    """f(z_t, t) = c_skip(t) z_t + c_out(t) x_0(output), which satisfies the boundary condition f(z, 0) = z.

    Shapes, dtype and errors as `predicted_origin`. Equation 9 of arXiv 2310.04378 for epsilon.
    """
    x_0 = predicted_origin(output, t, z_t, alphas, sigmas, prediction_type)
    c_skip, c_out = (c.reshape(-1, *[1] * (z_t.ndim - 1)) for c in boundary_scalings(t, timestep_scaling))
    return c_skip * z_t.float() + c_out * x_0


def guidance_embedding(w: Tensor, dim: int | None) -> Tensor | None:
    """Sinusoidal embedding of 1000 w: sines, then cosines, over frequencies 10000^(-i / (dim // 2 - 1)).

    `w` is (B,), the guidance weight of the paper (CFG scale - 1). Returns (B, dim) float32; for an odd `dim` the
    last column is 0. Returns None for `dim` None, that of a network without such an input. Raises ValueError for
    dim < 4. Matches `get_guidance_scale_embedding` of diffusers' pipelines.
    """
    if dim is None:
        return None
    if dim < 4:
        raise ValueError(f"dim is {dim}; a guidance embedding needs at least 4")
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1))
    )
    angles = 1000.0 * w.float()[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def apply_guidance(cond_output: Tensor, uncond_output: Tensor, w: Tensor) -> Tensor:
    """cond + w (cond - uncond): the paper's form of classifier-free guidance, with w = CFG scale - 1.

    Outputs are (B, C, h, w'), `w` is (B,); returns (B, C, h, w') float32. x_0 and eps are affine in the output, with
    weights that do not depend on the conditioning. So guiding the output once equals guiding x_0 and eps afterwards.
    """
    w = w.float().reshape(-1, *[1] * (cond_output.ndim - 1))
    cond_output, uncond_output = cond_output.float(), uncond_output.float()
    return cond_output + w * (cond_output - uncond_output)


class DDIMSolver:
    """The teacher's diffusion, and DDIM as the ODE solver of Algorithm 1, on the grid t_i = (i + 1) k - 1, k = T // N.

    `alphas_cumprod` is (T,); `prediction_type` says what a network's output stands for; `substeps` is the number of
    DDIM steps from one grid point to the one before. The grid is that of `LCMScheduler(original_inference_steps=N)`;
    if N does not divide T, it ends before T - 1 (`reaches_end` is False). Raises ValueError unless 1 <= N <= T.
    """

    def __init__(
        self, alphas_cumprod: Tensor, num_steps: int = 50, prediction_type: str = "epsilon", substeps: int = 1
    ):
        num_train_timesteps = len(alphas_cumprod)
        if not 1 <= num_steps <= num_train_timesteps:
            raise ValueError(f"num_steps is {num_steps}; allowed: 1 to {num_train_timesteps}")
        self.num_steps, self.prediction_type, self.substeps = num_steps, prediction_type, substeps
        self.k = num_train_timesteps // num_steps
        self.timesteps = torch.arange(1, num_steps + 1, device=alphas_cumprod.device) * self.k - 1
        self.reaches_end = num_steps * self.k == num_train_timesteps
        self.alphas, self.sigmas = noise_schedule(alphas_cumprod)

    def interval(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """(t_nk, t_n) for grid indices `n` (B,): a grid point and the timestep k before it, at least 0."""
        t_nk = self.timesteps[n]
        return t_nk, (t_nk - self.k).clamp(min=0)

    def path(self, t_nk: Tensor, t_n: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The `substeps` pairs (from, to) of timesteps (B,) that lead from `t_nk` to `t_n`, of equal length."""
        ends = [t_nk - (t_nk - t_n) * i // self.substeps for i in range(self.substeps + 1)]
        return [(ends[i], ends[i + 1]) for i in range(self.substeps)]

    def add_noise(self, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t: `add_noise` on the teacher's schedule."""
        return add_noise(z_0, noise, t, self.alphas, self.sigmas)

    def origin_and_noise(self, output: Tensor, t: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps): `predicted_origin` and `predicted_noise` on the teacher's schedule."""
        x_0 = predicted_origin(output, t, z_t, self.alphas, self.sigmas, self.prediction_type)
        return x_0, predicted_noise(output, t, z_t, self.alphas, self.sigmas, self.prediction_type)

    def step(self, x_0: Tensor, eps: Tensor, t_n: Tensor) -> Tensor:
        """z_n = alpha(t_n) x_0 + sigma(t_n) eps: one deterministic DDIM step to `t_n`; (B, C, h, w) float32.

        Source: `DDIMScheduler.step` with eta 0.
        """
        return add_noise(x_0, eps, t_n, self.alphas, self.sigmas)


class ConsistencyFunction:
    """f(z_t, t) of LCM: `consistency_function` on the schedule of a solver. It lands at s = 0, where f(z, 0) = z."""

    def __init__(self, solver: DDIMSolver, timestep_scaling: float = 10.0):
        self.solver, self.timestep_scaling = solver, timestep_scaling

    def end(self, t_n: Tensor, progress: float, generator: torch.Generator | None) -> Tensor:
        """The timesteps s (B,) int64 <= `t_n` where f lands from `t_n` and from the grid point after it.

        `progress` is the part of the run that is done, in [0, 1). What is random is drawn from `generator`.
        """
        return torch.zeros_like(t_n)

    def __call__(self, output: Tensor, t: Tensor, z_t: Tensor, s: Tensor) -> Tensor:
        """f for a network's `output` at (z_t, t), the point at s: (B, C, h, w) float32."""
        solver = self.solver
        return consistency_function(
            output, t, z_t, solver.alphas, solver.sigmas, solver.prediction_type, self.timestep_scaling
        )


class TrajectoryFunction(ConsistencyFunction):
    """f(z_t, t, s): a DDIM step to s, made of the network's own x_0 and eps, so that f(z, s, s) = z.

    s is drawn evenly in [0, t_n]. Source: Zheng et al., "Trajectory Consistency Distillation", arXiv 2402.19159, with
    the first-order parameterization, in which the network does not see s.
    """

    def end(self, t_n: Tensor, progress: float, generator: torch.Generator | None) -> Tensor:
        return (torch.rand(t_n.shape, generator=generator, device=t_n.device) * (t_n + 1)).long()

    def __call__(self, output: Tensor, t: Tensor, z_t: Tensor, s: Tensor) -> Tensor:
        return self.solver.step(*self.solver.origin_and_noise(output, t, z_t), s)


class PhasedFunction(TrajectoryFunction):
    """As TrajectoryFunction, but s is the lower edge of the phase of t_n.

    `num_phases` are used one after the other, each for an equal part of the run. The edges of M phases are the points
    where M steps of `TCDScheduler(original_inference_steps=N)` start and end. Sources: Wang et al., "Phased
    Consistency Models", arXiv 2405.18407; Ren et al., "Hyper-SD", arXiv 2404.13686, for fewer and fewer phases.
    """

    def __init__(self, solver: DDIMSolver, num_phases: list[int]):
        super().__init__(solver)
        self.edges = [phase_edges(solver, count) for count in num_phases]

    def end(self, t_n: Tensor, progress: float, generator: torch.Generator | None) -> Tensor:
        edges = self.edges[int(progress * len(self.edges))]
        return edges[torch.searchsorted(edges, t_n, right=True) - 1]


def phase_edges(solver: DDIMSolver, num_phases: int) -> Tensor:
    """The lower edges (M,) int64 of M phases of a solver's grid, ascending: 0 and M - 1 grid points.

    Raises ValueError unless 1 <= M <= N.
    """
    if not 1 <= num_phases <= solver.num_steps:
        raise ValueError(f"num_phases is {num_phases}; allowed: 1 to {solver.num_steps}")
    down = solver.timesteps.flip(0)
    edges = [down[m * solver.num_steps // num_phases] for m in range(num_phases - 1, 0, -1)]
    return torch.stack([torch.zeros_like(down[0]), *edges])


def make_consistency_function(
    target: str, solver: DDIMSolver, timestep_scaling: float, num_phases: list[int]
) -> ConsistencyFunction:
    """f by the name of its target. Raises ValueError for another name."""
    if target == "lcm":
        return ConsistencyFunction(solver, timestep_scaling)
    if target == "phased":
        return PhasedFunction(solver, num_phases)
    if target == "trajectory":
        return TrajectoryFunction(solver)
    raise ValueError(f"target is {target!r}; allowed: lcm, phased, trajectory")


def consistency_loss(prediction: Tensor, target: Tensor, loss_type: str = "l2", huber_c: float = 0.001) -> Tensor:
    """l2: mean of d^2; huber: mean of sqrt(d^2 + c^2) - c, with d = prediction - target.

    Both inputs are (B, ...). Returns a mean for each sample, (B,) float32. Raises ValueError for another
    `loss_type`. huber is the pseudo-Huber loss of Song & Dhariwal, "Improved Techniques for Training Consistency
    Models", arXiv 2310.14189, for each element.
    """
    difference = prediction.float() - target.float()
    if loss_type == "l2":
        return difference.square().flatten(1).mean(1)
    if loss_type == "huber":
        return ((difference.square() + huber_c**2).sqrt() - huber_c).flatten(1).mean(1)
    raise ValueError(f"loss_type is {loss_type!r}; allowed: l2, huber")


@torch.no_grad()
def update_ema(target: dict[str, Tensor], source: dict[str, Tensor], decay: float) -> None:
    """target <- decay target + (1 - decay) source, for two dicts of parameters with the same names.

    The targets keep their dtype and device. They may be in pinned host memory: each is then copied to the device of
    its source and back, without waiting. Raises ValueError if a parameter is in one dict only.
    """
    if target.keys() != source.keys():
        odd = sorted(target.keys() ^ source.keys())
        raise ValueError(f"the EMA and its source differ in {len(odd)} parameters, among them {odd[0]}")
    alike = [name for name, t in target.items() if (t.device, t.dtype) == (source[name].device, source[name].dtype)]
    if alike:
        torch._foreach_lerp_([target[name] for name in alike], [source[name] for name in alike], 1 - decay)
    for name in target.keys() - set(alike):  # one after the other: no second copy of all
        average = target[name].to(source[name].device, non_blocking=True)
        average.lerp_(source[name].to(average.dtype), 1 - decay)
        if average is not target[name]:
            target[name].copy_(average, non_blocking=True)


@torch.no_grad()
def relative_distance(target: dict[str, Tensor], source: dict[str, Tensor]) -> Tensor:
    """|target - source| / |target| over two dicts of parameters with the same names: a scalar on the source's device.

    One parameter after the other: a second copy of all parameters may not fit into memory.
    """
    pairs = ((tensor.to(source[name].device, non_blocking=True), source[name]) for name, tensor in target.items())
    sums = sum(torch.stack([(a - b).float().square().sum(), a.float().square().sum()]) for a, b in pairs)
    return (sums[0] / sums[1]).sqrt()  # type: ignore[index]
