"""One call of the transformer beside diffusers' Wan transformer."""

from benchmarks.measuring import interleaved, table
from benchmarks.sizes import Sizes
from benchmarks.wan import DTYPES, PEER, Pair, calls, check_agreement


def measure(sizes: Sizes, threads: int) -> str:
    """The text with the table."""
    rows, agreements = [], []
    for name, dtype in DTYPES.items():
        made = calls(Pair.of(sizes.blocks, dtype), sizes, dtype)
        agreements.append(f"{check_agreement(made, name):.1g} in {name}")
        times = interleaved(made, sizes.rounds)
        for call, taken in times.items():
            rows.append([call, name, f"{taken.median:.3f}", f"{taken.ratio(times[PEER]):.3f}"])
    tokens = sizes.latent_frames * (sizes.latent_size // 2) ** 2
    return "\n\n".join(
        [
            f"One call at the widths of the 1.3B model, batch of one, blocks: {sizes.blocks}, "
            f"{sizes.latent_frames} x {sizes.latent_size} x {sizes.latent_size} latents ({tokens:,} tokens); "
            f"median of {sizes.rounds} rounds. diffusers' model is configured as Wan 2.1 image-to-video and "
            "has the same random weights. Without audio the two give the same velocity; the largest "
            f"difference, relative to the largest value, is {' and '.join(agreements)}.",
            table(["call", "dtype", "seconds", "ours / diffusers"], rows),
        ]
    )
