"""Fixtures of metrics (folder eval): features.npz, metrics.json, pr_arrays.npz, analytic.npz and .json, quantise.npz.

A JSON file says in words of which arrays of the .npz beside it a number is; the words are read here. Metrics are
float64 on the host, so there is one precision. Tolerances are the README's.
"""

from __future__ import annotations

import fnmatch
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from conventions import consecutive_blocks, frechet_bias, population

from diffusion_distill.data.quantise import quantise
from diffusion_distill.evaluation import (
    Accumulator,
    Moments,
    frechet_distance,
    frechet_terms,
    inception_score,
    kid,
    memberships,
    moments,
    precision_recall,
    random_subsets,
)
from diffusion_distill.evaluation.precision_recall import squared_radii
from golden_checks.common import FLOAT32, FLOAT64, Fixture, Kind, Mode, Rule, absolute, exact, keys_like, relative

Arrays = Mapping[str, np.ndarray]
#: Patterns of names of Gaussians -> the README's tolerance; 1e-10 for all others.
ANALYTIC_RULES = {"*_rank*_vs_rank*": absolute(1e-6), "*_ill_conditioned": relative(1e-8)}
KID_RULE = absolute(1e-10)
SHARE = absolute(1e-12, " absolute (a share of points)")


def beside(fixture: Fixture, *needed: str) -> Arrays:
    """The arrays of the .npz in the fixture's folder that has all that are needed."""
    for path in sorted(fixture.path.parent.glob("*.npz")):
        with np.load(path) as stored:
            if set(needed) <= set(stored.files):
                return {key: stored[key] for key in stored.files}
    raise FileNotFoundError(f"no .npz with {', '.join(needed)} beside {fixture.name}")


def refuse(fixture: Fixture, what: str, act: Callable[[], object]) -> None:
    """Reports whether the package raises the ValueError that it promises for bad input."""
    try:
        got = act()
    except ValueError:
        fixture.report(f"{what} (refused)", 0.0, FLOAT64, exact())
    else:
        fixture.fail(what, f"gives {got} instead of an error")


# ------------------------------------------------------------------------------------ what the words mean

SET = re.compile(
    r"(?:(?P<scale>[\d.]+(?:e-?\d+)?)\*)?(?P<name>[a-z]\w*)(?:\[(?P<index>[^\]]+)\])?"
    r"(?:\s*\+\s*(?P<shift>[\d.]+))?(?: repeated (?P<times>\d+) times(?: \(\d+ rows\))?)?"
)
SPOILT = re.compile(r"(.+) with (\w+)\[(\d+), ?(\d+)\]=(nan|inf)")
ZEROED = re.compile(r"(.+) with columns (\d+)\.\.(\d+) set to 0 in both")
MOVED = re.compile(r"(.+) with ([\d.]+) added to column (\d+)")


def features_of(words: str, arrays: Arrays) -> np.ndarray:
    """What is called 'a64', '1e3*a64', 'a64[:20]', 'a64[:, :1]', 'b64[:80]+50' or 'a64[:60] repeated 4 times'."""
    if spoilt := SPOILT.fullmatch(words):
        features = features_of(spoilt[1], arrays)
        features[int(spoilt[3]), int(spoilt[4])] = float(spoilt[5])
        return features
    match = SET.fullmatch(words.strip())
    if match is None or match["name"] not in arrays:
        raise ValueError(f"these words name no features: {words!r}")
    index = [
        slice(*(int(n) if n else None for n in part.strip().split(":"))) for part in (match["index"] or ":").split(",")
    ]
    features = arrays[match["name"]].astype(np.float64)[tuple(index)]
    features = features * float(match["scale"] or 1) + float(match["shift"] or 0)
    return np.tile(features, (int(match["times"] or 1), 1))


def two_sets(words: str, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The sets of '... vs ...', with what is done to them."""
    left, right = words.split(" vs ")
    if zeroed := ZEROED.fullmatch(right):
        a, b = features_of(left, arrays), features_of(zeroed[1], arrays)
        for features in (a, b):
            features[:, int(zeroed[2]) : int(zeroed[3]) + 1] = 0
        return a, b
    if moved := MOVED.fullmatch(right):
        a, b = features_of(left, arrays), features_of(moved[1], arrays)
        b[:, int(moved[3])] += float(moved[2])
        return a, b
    return features_of(left, arrays), features_of(right, arrays)


def reference_and_samples(words: str, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The sets of 'ref ..., samples ...' or 'ref = samples = ...'."""
    if both := re.fullmatch(r"ref = samples = (.+)", words):
        features = features_of(both[1], arrays)
        return features, features
    match = re.fullmatch(r"ref (?:= )?(.+), samples (.+)", words)
    if match is None:
        raise ValueError(f"these words name no reference and samples: {words!r}")
    return features_of(match[1], arrays), features_of(match[2], arrays)


# ------------------------------------------------------------------------------------------ metrics.json


def check_metrics(fixture: Fixture, mode: Mode) -> None:
    arrays = beside(fixture, "logits", "kid_idx_a", "kid_idx_b")
    sections = {"frechet": check_frechet, "inception_score": check_inception_score, "kid": check_kid}
    for name, check in {**sections, "precision_recall": check_precision_recall}.items():
        if name in fixture.meta:
            check(fixture, mode, fixture.meta[name], arrays)
    if "inception_fixture_metrics" in fixture.meta:
        check_of_network(fixture, mode)


def check_frechet(fixture: Fixture, mode: Mode, cases: Mapping[str, Any], arrays: Arrays) -> None:
    for case, recorded in cases.items():
        key = f"frechet/{case}"
        a, b = two_sets(str(fixture.input(f"{key}/inputs")), arrays)
        if "fd" not in recorded:
            refuse(fixture, key, lambda a=a, b=b: frechet_distance(moments(a), moments(b)))
            continue
        a, b = moments(a), moments(b)
        rule = frechet_rule(recorded["inputs"])
        terms = quiet(frechet_terms, a, b)
        fixture.compare(f"{key}/fd", sum(terms), mode, rule)
        fixture.compare(f"{key}/mean_term", terms.mean, mode, rule)
        of_n = quiet(frechet_distance, population(a), population(b))
        fixture.compare(f"{key}/fd_with_ddof0_covariance", of_n, mode, rule)


def frechet_rule(words: str) -> Rule:
    """The README's tolerance: absolute for identical sets, 1e-6 for scaled ones so small that rounding shows."""
    left, right = words.split(" vs ")
    scaled = SET.fullmatch(left.strip())
    if left == right:
        return absolute(1e-9)
    return relative(1e-6 if scaled and float(scaled["scale"] or 1) < 1 else 1e-9)


def check_inception_score(fixture: Fixture, mode: Mode, cases: Mapping[str, Any], arrays: Arrays) -> None:
    logits, key = arrays["logits"], "inception_score"
    classes = logits.shape[1]
    hard = 2000.0 * np.eye(classes)[np.arange(2 * classes) % classes]

    def compare(name: str, found: Any, bound: float = 1e-10) -> None:
        for field in ("mean", "std"):
            rule = relative(bound) if field == "mean" else absolute(bound)
            fixture.compare(f"{key}/{name}/{field}", getattr(found, field), mode, rule)
        fixture.compare(f"{key}/{name}", found.mean, mode, relative(bound))

    for match in fixture.matches(rf"{key}/openai_evaluator/float(64|32)_split(\d+)"):
        found = inception_score(logits, chunk=int(match[2]))
        compare(match[0].removeprefix(f"{key}/"), found, 1e-10 if match[1] == "64" else 1e-5)
    compare("openai_evaluator/constant_logits", inception_score(np.zeros_like(hard), chunk=5000))
    compare("tfgan/all", inception_score(logits))
    compare("tfgan/hard_one_hot_logits", inception_score(hard))
    for match in fixture.matches(rf"{key}/(torch_fidelity_(?:no)?shuffle(\d*)_splits(\d+))/mean"):
        order = np.random.RandomState(int(match[2])).permutation(len(logits)) if match[2] else slice(None)
        compare(match[1], inception_score(logits[order], splits=int(match[3])))
    for match in fixture.matches(rf"{key}/split_scores_(\d+)"):
        fixture.compare(match[0], inception_score(logits, splits=int(match[1])).scores, mode, relative(1e-10))
    compare("hard_one_hot_logits_splits1", inception_score(hard, splits=1))
    if "more_splits_than_samples" in cases:
        refuse(fixture, f"{key}/more_splits_than_samples", lambda: inception_score(logits[:5], splits=10))
        refuse(fixture, f"{key}/nan_logit_splits10", lambda: inception_score(np.where(logits, np.nan, 0), splits=10))


def check_kid(fixture: Fixture, mode: Mode, cases: Mapping[str, Any], arrays: Arrays) -> None:
    for match in fixture.matches(r"kid/estimators/(\w+)/([\w-]+)"):
        found = kid(*kid_sets(match[1], arrays), estimator=match[2]).mean
        fixture.compare(match[0], found, mode, KID_RULE)
    a, b = arrays["a64"], arrays["b64"]
    recorded = list(zip(arrays["kid_idx_a"], arrays["kid_idx_b"], strict=True))
    found, key = kid(a, b, recorded), "kid/recorded_subsets"
    spreads = {"std_ddof0": found.std, "std_ddof1": found.std_error * np.sqrt(len(recorded))}
    for name, value in {"per_subset": found.values, "mean": found.mean, **spreads}.items():
        fixture.compare(f"{key}/{name}", value, mode, KID_RULE)
    fixture.compare("kid/clean_fid_on_recorded_subsets", found.mean, mode, KID_RULE)
    for match in fixture.matches(r"(kid/torch_fidelity_seed(\d+)_subsets(\d+)_size(\d+))/mean"):
        seed, count, size = (int(match[group]) for group in (2, 3, 4))
        found = kid(a, b, random_subsets(len(a), len(b), count, size, seed))
        fixture.compare(match[0], found.mean, mode, KID_RULE)
        fixture.compare(f"{match[1]}/std", found.std, mode, KID_RULE)
    for match in fixture.matches(r"(kid/tfgan_blocks/(\w+)_block(\d+))/kid"):
        x, y = kid_sets(match[2], arrays)
        found = kid(x, y, consecutive_blocks(len(x), len(y), int(match[3])))
        fixture.compare(match[0], found.mean, mode, KID_RULE)
        fixture.compare(f"{match[1]}/std_error", found.std_error, mode, KID_RULE)
    if "edge" in cases:
        refuse(fixture, "kid/edge/torch_fidelity_subset_size_*", lambda: random_subsets(len(a), len(b), 1, len(a) + 1))
        refuse(fixture, "kid/edge/nan_feature", lambda: kid(np.where(a == a[7, 3], np.nan, a), b))
        refuse(fixture, "kid/edge/one_sample", lambda: kid(a[:1], b[:1]))
        fixture.compare("kid/edge/two_samples", kid(a[:2], b[:2]).mean, mode, KID_RULE)


def kid_sets(case: str, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The sets of a case: 'a64_b64' by name, 'a320_b320' by their rows, 'dim2048[_48]' by width, or in words."""
    a, b = arrays["a64"].astype(np.float64), arrays["b64"].astype(np.float64)
    if case in ("identical", "disjoint"):
        return (a, a) if case == "identical" else (a[: len(b)], b + 5)
    if sets := re.fullmatch(r"a(\d+)_b(\d+)", case):
        return (a, b) if case == "a64_b64" else (a[: int(sets[1])], b[: int(sets[2])])
    if sets := re.fullmatch(r"dim(\d+)(?:_(\d+))?", case):
        rows = slice(int(sets[2]) if sets[2] else None)
        return arrays[f"a{sets[1]}"][rows], arrays[f"b{sets[1]}"][rows]
    raise ValueError(f"this case of KID is not known: {case!r}")


def check_precision_recall(fixture: Fixture, mode: Mode, cases: Mapping[str, Any], arrays: Arrays) -> None:
    for case in (case for case, recorded in cases.items() if "inputs" in recorded):
        key = f"precision_recall/{case}"
        sets = reference_and_samples(str(fixture.input(f"{key}/inputs")), arrays)
        for match in fixture.matches(rf"{key}/k(\d+)/precision"):
            found = precision_recall(*sets, k=int(match[1]))
            fixture.compare(match[0], found.precision, mode, SHARE)
            fixture.compare(f"{key}/k{match[1]}/recall", found.recall, mode, SHARE)
    if "edge_openai_evaluator" in cases:
        three = arrays["a64"][:3]
        refuse(fixture, "precision_recall/edge_openai_evaluator/too_few_n3_k3", lambda: precision_recall(three, three))


def check_of_network(fixture: Fixture, mode: Mode) -> None:
    """The metrics of the network's recorded outputs; what the package's network puts out is compared with these."""
    outputs = beside(fixture, "a_child_names")
    features = {"fid_pool3_variant_a": "a_pool3", "fid_pool3_variant_b": "b_pool3", "sfid_variant_b": "b_spatial"}
    for match in fixture.matches(r"inception_fixture_metrics/(\w+)_(\d+)_vs_(\d+)"):
        a, b = (moments(outputs[f"{features[match[1]]}_{size}"]) for size in match.groups()[1:])
        fixture.compare(match[0], quiet(frechet_distance, a, b), mode, relative(1e-3))
    for match in fixture.matches(r"inception_fixture_metrics/inception_score_variant_b_nobias_\d+_images_(\d+)_split"):
        sizes = sorted(int(key.rpartition("_")[2]) for key in outputs if key.startswith("b_logits_nobias_"))
        logits = np.concatenate([outputs[f"b_logits_nobias_{size}"] for size in sizes])
        fixture.compare(match[0], inception_score(logits, splits=int(match[1])).mean, mode, relative(1e-3))


def quiet(distance: Callable[..., Any], *arguments: Any) -> Any:
    """A distance of fixtures whose covariances are singular on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*covariance is singular", UserWarning)
        return distance(*arguments)


OTHERS = "what another program prints; `fd` is compared"
LOWER = "another program's, in lower precision; the package computes in float64"
EDGE = "what another program does with bad input, which the package refuses"


def metrics_skips(fixture: Fixture) -> list[tuple[list[str], str]]:
    like: Callable[..., list[str]] = partial(keys_like, fixture)
    refused = [case for case, recorded in fixture.meta.get("frechet", {}).items() if "fd" not in recorded]
    return [
        (like("versions/*"), "names the programs"),
        ([key for case in refused for key in like(f"frechet/{case}/references/*")], EDGE),
        (like("frechet/*/references/*", "frechet/*/references_max_abs_deviation_from_fd"), OTHERS),
        (like("frechet_float32_hazard/*"), "a warning; the package computes in float64"),
        (like("inception_score/openai_evaluator/hard_one_hot_logits"), "another program's NaN; `tfgan` is compared"),
        (
            like("inception_score/more_splits_than_samples/*", "inception_score/nan_logit_splits10/*", "kid/edge/*"),
            EDGE,
        ),
        (like("precision_recall/*/decisive_relative_margin"), "says how far points are from the border"),
        (like("precision_recall/*/torch_fidelity*", "precision_recall/*/openai_evaluator_half*"), LOWER),
        (like("precision_recall/edge_openai_evaluator/*"), EDGE),
    ]


# ---------------------------------------------------------------------------- features.npz, pr_arrays.npz


def check_features(fixture: Fixture, mode: Mode) -> None:
    """The inputs of metrics.json: moments in uneven batches, in two parts, are those of the whole."""
    for key in sorted(fixture.arrays):
        array = fixture.input(key)
        if not re.fullmatch(r"[ab]\d+", key) or array.shape[1] > 512:
            continue
        whole, parts = moments(array), [Accumulator(), Accumulator()]
        borders = [0, 1, 8, 57, len(array) // 2, len(array)]
        for number, (start, stop) in enumerate(pairwise(sorted(borders))):
            parts[number % 2].add(array[start:stop])
        parts[0].merge(parts[1])
        streamed = parts[0].moments()
        for name in ("mean", "cov"):
            got, reference = getattr(streamed, name), getattr(whole, name)
            error = np.abs(got - reference).max() / np.abs(reference).max()
            fixture.report(f"{key} ({name} in batches)", float(error), mode, relative(1e-12))
    for key, rows in (("kid_idx_a", "a64"), ("kid_idx_b", "b64")):
        inside = (fixture.input(key) >= 0).all() and (fixture.input(key) < len(fixture.arrays[rows])).all()
        fixture.report(f"{key} (rows of {rows})", float(not inside), mode, exact())


PR_NAMES = r"pr_(?P<case>\w+)_k(?P<k>\d+)_(?P<what>sample_in_ref|ref_in_sample|radius2_ref|radius2_sample)"


def words_of(fixture: Fixture, case: str) -> str:
    """Which sets a case of precision and recall compares: as a JSON beside says, or else the README."""
    for path in sorted(fixture.path.parent.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and case in content.get("precision_recall", {}):
            return content["precision_recall"][case]["inputs"]
    if case != "main":
        raise ValueError(f"nothing says which sets the case {case!r} compares")
    return "ref a64, samples b64"


def check_points(fixture: Fixture, mode: Mode) -> None:
    arrays = beside(fixture, "a64", "b64")
    for case, k in sorted({(match["case"], int(match["k"])) for match in fixture.matches(PR_NAMES)}):
        reference, samples = reference_and_samples(words_of(fixture, case), arrays)
        sample_is_in, reference_is_in = memberships(reference, samples, k)
        fixture.equal(f"pr_{case}_k{k}_sample_in_ref", sample_is_in)
        fixture.equal(f"pr_{case}_k{k}_ref_in_sample", reference_is_in)
        for name, points in (("ref", reference), ("sample", samples)):
            fixture.compare(f"pr_{case}_k{k}_radius2_{name}", squared_radii(points, k), mode, relative(1e-10))


# ---------------------------------------------------------------------------------------------- analytic


def pairs_of(arrays: Arrays) -> dict[str, tuple[Moments, Moments]]:
    """The pairs of Gaussians by name."""
    names = [key.removesuffix("_mu1") for key in arrays if key.endswith("_mu1")]
    return {
        name: tuple(Moments(None, arrays[f"{name}_mu{i}"], arrays[f"{name}_sigma{i}"]) for i in (1, 2))
        for name in names
    }  # type: ignore[misc]


def analytic_rule(name: str) -> Rule:
    """The README's, for a pair of Gaussians."""
    return next((rule for pattern, rule in ANALYTIC_RULES.items() if fnmatch.fnmatch(name, pattern)), relative(1e-10))


def check_gaussians(fixture: Fixture, mode: Mode) -> None:
    """The inputs of analytic.json: distances do not depend on the order, and are 0 of a Gaussian to itself."""
    for key in fixture.arrays:
        fixture.input(key)
    for name, (a, b) in pairs_of(fixture.arrays).items():
        rule = analytic_rule(name)
        forward, back, same = (quiet(frechet_distance, *pair) for pair in ((a, b), (b, a), (a, a)))
        scale = rule.scale(np.asarray(forward))
        fixture.report(f"{name} (swapped)", abs(forward - back) / scale, mode, rule)
        fixture.report(f"{name} (to itself)", abs(same), mode, absolute(1e-9))


def check_analytic(fixture: Fixture, mode: Mode) -> None:
    pairs = pairs_of(beside(fixture, *(f"{name}_mu1" for name in fixture.meta.get("pairs", {}))))
    for name in fixture.meta.get("pairs", {}):
        key, (a, b) = f"pairs/{name}", pairs[name]
        rule = analytic_rule(name)
        terms = quiet(frechet_terms, a, b)
        fixture.equal(f"{key}/d", a.width)
        for field in ("fd", "fd_float64", "closed_form"):
            fixture.compare(f"{key}/{field}", sum(terms), mode, rule)
        fixture.compare(f"{key}/mean_term", terms.mean, mode, relative(1e-10))
    for name, case in fixture.meta.get("finite_sample", {}).items():
        check_bias(fixture, mode, f"finite_sample/{name}", case)
    for match in fixture.matches(r"direct_sampling_check_(\w+)_n(\d+)/mean"):
        key = match[0].removesuffix("/mean")
        case = fixture.meta["finite_sample"][match[1]]
        found = sampled_distances(spectrum_of(case), int(match[2]), 40, ())["same_two_sided"]
        allowed = 5 * found.std() / np.sqrt(len(found)) + 5 * float(fixture.input(f"{key}/se"))
        fixture.compare(f"{key}/mean", found.mean(), mode, absolute(allowed, " 5 standard errors"))


def check_bias(fixture: Fixture, mode: Mode, key: str, case: Mapping[str, Any]) -> None:
    """First-order biases by formula; means over repetitions by drawing, within five standard errors."""
    variances = spectrum_of(case)
    for field in ("d", "spectrum", "repeats"):
        fixture.input(f"{key}/{field}")
    truth = Moments(None, np.zeros(len(variances)), np.diag(variances))
    other = Moments(None, np.full(len(variances), 0.1), 1.2 * np.diag(variances))
    fixture.compare(f"{key}/different_pair_true_fd", frechet_distance(truth, other), mode, relative(1e-10))
    for size in case["by_n"]:
        at, n = f"{key}/by_n/{size}", int(size)
        against = [int(match[1]) for match in fixture.matches(rf"{at}/same_vs_(\d+)_first_order")]
        first_order = {"same_two_sided": n, "same_known_reference": np.inf, **{f"same_vs_{m}": m for m in against}}
        for field, m in first_order.items():
            expected = frechet_bias(variances, n, m)
            fixture.compare(f"{at}/{field}_first_order", expected, mode, relative(1e-10))
        repeats = 20 if n <= 5000 else 3
        for field, found in sampled_distances(variances, n, repeats, against).items():
            if f"{at}/{field}/mean" in fixture:
                sd, se = (float(fixture.input(f"{at}/{field}/{name}")) for name in ("sd", "se"))
                rule = absolute(5 * sd / np.sqrt(repeats) + 5 * se, " 5 standard errors")
                fixture.compare(f"{at}/{field}/mean", found.mean(), mode, rule)


def spectrum_of(case: Mapping[str, Any]) -> np.ndarray:
    """The eigenvalues that a case names in words."""
    words, width = case["spectrum"], int(case["d"])
    if words == "all ones":
        return np.ones(width)
    if match := re.fullmatch(r"exp\(-([\d.]+) i/d\), i=0\.\.d-1", words):
        return np.exp(-float(match[1]) * np.arange(width) / width)
    raise ValueError(f"these words name no spectrum: {words!r}")


def sampled_distances(variances: np.ndarray, n: int, repeats: int, against: Iterable[int]) -> dict[str, np.ndarray]:
    """Distances of drawn sets, by the name of the comparison: [repeats] each; also from references of other sizes."""
    rng = np.random.default_rng([n, len(variances)])
    scale, width = np.sqrt(variances), len(variances)
    truth = Moments(None, np.zeros(width), np.diag(variances))

    def draw(count: int, mean: float = 0.0, stretch: float = 1.0) -> Moments:
        return moments(rng.standard_normal((count, width)) * (scale * np.sqrt(stretch)) + mean)

    known = {size: draw(size) for size in against}
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        one = draw(n)
        others = {"same_two_sided": draw(n), "same_known_reference": truth, "different_two_sided": draw(n, 0.1, 1.2)}
        # A large reference is drawn once, as its own share of the spread is small beside that of n; else anew.
        others |= {f"same_vs_{m}_reference": known[m] if n < m else draw(m) for m in known}
        for name, other in others.items():
            found.setdefault(name, []).append(frechet_distance(one, other))
    return {name: np.array(values) for name, values in found.items()}


# ---------------------------------------------------------------------------------------------- quantise

QUANTISED = {
    "floor_127p5x_plus_128": "round_half_up",
    "trunc_127p5_x_plus_1": "truncate",
    "round_127p5_x_plus_1": "round_half_even",
    "trunc_255u": "truncate_unit",
}


def check_quantise(fixture: Fixture, mode: Mode) -> None:
    x = fixture.input("x").astype(np.float32)
    for images in (x, jnp.asarray(x)):  # on the host and on the device
        for key, rule in QUANTISED.items():
            fixture.compare(key, quantise(images, rule), mode, exact())


def has(fixture: Fixture, names: Iterable[str], suffix: str) -> bool:
    """Whether the fixture is a file of this kind with one of the top-level names."""
    return fixture.path.suffix == suffix and any(name in (fixture.meta or fixture.arrays) for name in names)


HOST: tuple[Mode, ...] = (FLOAT64,)
KINDS = [
    Kind(
        "metrics",
        lambda f: has(f, ("frechet", "kid", "inception_score", "precision_recall"), ".json"),
        check_metrics,
        metrics_skips,
        HOST,
    ),
    Kind("features", lambda f: "kid_idx_a" in f and "logits" in f, check_features, modes=HOST),
    Kind("points of precision and recall", lambda f: bool(f.matches(PR_NAMES)), check_points, modes=HOST),
    Kind("Gaussians", lambda f: bool(f.matches(r"\w+_mu1") and f.matches(r"\w+_sigma2")), check_gaussians, modes=HOST),
    Kind(
        "distances of Gaussians",
        lambda f: has(f, ("pairs", "finite_sample"), ".json"),
        check_analytic,
        lambda f: [(keys_like(f, "pairs/*/method", "pairs/*/note"), "says how the number was made")],
        HOST,
    ),
    Kind(
        "quantised images", lambda f: "x" in f and any(key in f for key in QUANTISED), check_quantise, modes=(FLOAT32,)
    ),
]
