"""Draws docs/architecture.svg: the floors and the two journeys through them.

python docs/draw_architecture.py
"""

from pathlib import Path

FLOORS = [
    ("7  main", ["main.py: train · distill · sample · evaluate", "fit · solvers · similarity … · import · export"]),
    ("6  build", ["cli/build.py: config → objects"]),
    ("5  runs", ["runs/: the same as plain functions"]),
    (
        "4  training",
        ["loop · step · gradients · state · ema", "optimizers · sharding · logs", "checkpoint · workdir · artefact"],
    ),
    (
        "3  methods",
        ["distillation/: progressive · tract · knowledge", "closure · phases · denoising · dode", "weights/"],
    ),
    (
        "2  tables, models",
        [
            "solvers/: ddim · deis · dpm_solver · …",
            "solvers/engine.py: the engine of all tables",
            "denoisers/model.py · denoisers/guidance.py",
        ],
    ),
    ("1  concepts", ["diffusion/: schedules · grids · forward …", "networks/ · data/ · evaluation/ · report/"]),
    ("0  language", ["process/levels.py: (alpha, sigma)", "typing · arrays · settings · errors"]),
]
WIDTH, ROW, TOP, LEFT = 1000, 62, 54, 190
BATCH, NOISE = "#b5542c", "#2c6fb5"


def text(x: float, y: float, content: str, size: int = 14, colour: str = "#222", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{content}</text>'


def journey(x: int, colour: str, stops: list[tuple[int, str]]) -> list[str]:
    """A path down through floors, with a note at each stop."""
    ys = [TOP + ROW * (7 - floor) + ROW / 2 - 4 for floor, _ in stops]
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
        text(16, 26, "A module imports only from lower floors", 15),
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
        [(5, "train, distill: phases, state, mesh"), (4, "loop → jitted step → Adam → averages"),
         (3, "rows → z → target → weighted error"), (2, "teacher, self-teacher, student"), (1, "images; the network")],
    )  # fmt: skip
    parts += journey(
        910, NOISE,
        [(5, "sample: keys per image"), (2, "engine: table × denoiser, row by row"), (1, "x_hat at the end")],
    )  # fmt: skip
    Path(__file__).with_name("architecture.svg").write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
