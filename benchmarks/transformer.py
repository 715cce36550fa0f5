"""One call of the transformer beside diffusers' Wan transformer."""

from benchmarks.measuring import Times, interleaved, table
from benchmarks.sizes import Sizes
from benchmarks.wan import DTYPES, PEER, Pair, calls, check_agreement
from stableavatar.config import SIZES


def measure(sizes: Sizes, threads: int) -> str:
    """The text with the table."""
    few, many = sizes.blocks
    released = SIZES["1.3b"].transformer["num_layers"]
    rows, agreements = [], []
    for name, dtype in DTYPES.items():
        made = {blocks: calls(Pair.of(blocks, dtype), sizes, dtype) for blocks in sizes.blocks}
        agreements.append(f"{check_agreement(made[many], name):.1g} in {name}")
        turns = {(blocks, call): do for blocks in made for call, do in made[blocks].items()}
        times = interleaved(turns, sizes.rounds)
        for call in made[many]:
            times[released, call] = _reckoned(times[few, call], times[many, call], sizes.blocks, released)
        for call in made[many]:
            shown = [f"{times[blocks, call].median:.3f}" for blocks in sizes.blocks]
            ratios = [f"{times[n, call].ratio(times[n, PEER]):.3f}" for n in (*sizes.blocks, released)]
            rows.append([call, name, *shown, *ratios])
    tokens = sizes.latent_frames * (sizes.latent_size // 2) ** 2
    headings = [
        "call", "dtype", f"seconds, blocks: {few}", f"seconds, blocks: {many}",
        *(f"ours / diffusers, blocks: {blocks}" for blocks in (*sizes.blocks, released)),
    ]  # fmt: skip
    return "\n\n".join(
        [
            "One call at the widths of the 1.3B model, batch of one, "
            f"{sizes.latent_frames} x {sizes.latent_size} x {sizes.latent_size} latents ({tokens:,} tokens); "
            f"median of {sizes.rounds} rounds. The ratio at {released} blocks is reckoned from the others: "
            "what does not grow with the blocks weighs less there. diffusers' model is configured as Wan 2.1 "
            "image-to-video and has the same random weights. Without audio the two give the same velocity; "
            f"the largest difference, relative to the largest value, is {' and '.join(agreements)}.",
            table(headings, rows),
        ]
    )


def _reckoned(few: Times, many: Times, blocks: tuple[int, ...], released: int) -> Times:
    """Seconds with all blocks of the released model, in every round."""
    smaller, larger = blocks
    return Times(
        tuple(
            less + (more - less) * (released - smaller) / (larger - smaller)
            for less, more in zip(few.seconds, many.seconds, strict=True)
        )
    )
