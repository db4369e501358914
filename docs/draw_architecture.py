"""Draws docs/architecture.svg: the rooms on their floors and the two journeys through them.

python docs/draw_architecture.py
"""

from pathlib import Path

FLOORS = [
    ("8  cli, main", ["the command line: modes, and the one place", "that reads configs"]),
    ("7  studies", ["comparing solvers, trajectories, similarity, lambdas"]),
    ("6  api", ["train · distill · sample · fit · evaluate", "import · export"]),
    ("5  training, weights", ["loop · step · ema · checkpoint · artefact", "published models and their layouts"]),
    ("4  methods, evaluation", ["denoising · progressive · tract · knowledge", "targets · loss; features and metrics"]),
    ("3  solvers", ["table · forms · engine · ddim · heun · …", "dode: directions and their fit"]),
    ("2  denoisers, report", ["Denoise · Model · adapters · conditions", "clipping · guidance; pictures and tables"]),
    ("1  concepts", ["process/: levels · grids · predictions · …", "networks/ · data/ · formats/"]),
    ("0  base", ["arrays · errors · files · registry · seeds"]),
]
TOP_FLOOR = len(FLOORS) - 1
WIDTH, ROW, TOP, LEFT = 1000, 62, 54, 215
BATCH, NOISE = "#b5542c", "#2c6fb5"


def text(x: float, y: float, content: str, size: int = 14, colour: str = "#222", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{content}</text>'


def journey(x: int, colour: str, stops: list[tuple[int, str]]) -> list[str]:
    """A path down through floors, with a note at each stop."""
    ys = [TOP + ROW * (TOP_FLOOR - floor) + ROW / 2 - 4 for floor, _ in stops]
    lines = [f'<path d="M{x} {ys[0]} V{ys[-1]}" stroke="{colour}" stroke-width="3" fill="none"/>']
    for y, (_, note) in zip(ys, stops, strict=True):
        lines += [f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>', text(x + 12, y + 4, note, 12, colour)]
    return lines


def main() -> None:
    """Writes the picture."""
    height = TOP + ROW * len(FLOORS) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 200} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH + 200}" height="{height}" fill="white"/>',
        text(16, 26, "A room imports only from lower floors", 15),
        text(640, 26, "a batch", 15, BATCH),
        text(930, 26, "a noise tensor", 15, NOISE),
    ]
    for k, (name, boxes) in enumerate(FLOORS):
        y = TOP + ROW * k
        shade = "#f6f3ee" if k % 2 else "#ece7de"
        parts.append(f'<rect x="8" y="{y}" width="{WIDTH + 184}" height="{ROW - 8}" rx="6" fill="{shade}"/>')
        parts.append(text(20, y + 32, name, 15))
        parts += [text(LEFT, y + 18 + 16 * j, box, 12, "#444") for j, box in enumerate(boxes)]
    parts += journey(
        620, BATCH,
        [(6, "train, distill: phases, state, mesh"), (5, "loop → jitted step → Adam → averages"),
         (4, "rows → z → target → weighted error"), (2, "teacher, self-teacher, student"), (1, "samples; the network")],
    )  # fmt: skip
    parts += journey(
        910, NOISE,
        [(6, "sample: keys per sample"), (3, "engine: table × denoiser, row by row"), (2, "x_hat from the output"),
         (1, "the network")],
    )  # fmt: skip
    Path(__file__).with_name("architecture.svg").write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
