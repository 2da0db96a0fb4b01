"""The verdict in words, of made-up numbers for each of its branches."""

from dataclasses import replace

import pytest

from pipeline.audit.rows import NAMES, Row
from pipeline.audit.verdict import verdict

N = 10_000
SURE = (1e-9, 1e-9, 1e-9)
NOISE = "optimal_q at blocks.5 (during eval, all tokens)"


def row(protocol: int, k: int, *counts: int, **others) -> Row:
    noise = NOISE if protocol in (2, 3, 4, 5, 7) else None
    mates = {3: 1.0, 4: 0.1, 5: 0.0, 6: 1.0}.get(protocol)
    values = {"noise": noise, "counts": counts, "n": N, "class_mates": mates, "transductive": k > 1} | others
    return Row(protocol, NAMES[protocol], k, "any", **values)


def made(*changed: Row) -> list[Row]:
    """PAPER.md's small ViT at `blocks.5`, all tokens, k = 10, but for the changed rows."""
    rows = [
        row(1, 1, 5943),
        row(2, 1, 5943, differing=0),
        row(3, 2, 7000, p=1e-9, p_voting=1.0),
        row(3, 10, 9639, p=0.0, p_voting=1e-9),
        row(4, 2, 5500, 5510, 5490, seed_ps=SURE),
        row(4, 10, 2823, 2850, 2800, seed_ps=SURE),
        row(5, 2, 5600, p=1e-9),
        row(5, 10, 2000, p=1e-9),
        row(6, 2, 7000, p=1e-9),
        row(6, 10, 9790, p=0.0),
        row(7, 10, 400, n=500, beside=10, measure="answered_b", p=1e-9),
        row(9, 1, remark="not run: name the clean twin with --twin"),
    ]
    places = {(r.protocol, r.k): r for r in rows}
    return list((places | {(r.protocol, r.k): r for r in changed}).values())


def words(kind: str, rows: list[Row]) -> str:
    found = {finding.kind: finding.words for finding in verdict(rows)}
    assert kind in found, f"{kind} is not among {list(found)}"
    return found[kind]


def test_the_headline_is_per_image_and_comes_first():
    first = verdict(made())[0]
    assert first.kind == "per image"
    assert "Per image, noise off, the model has 59.43 % top-1 (5,943 of 10,000; 95 %: 58.46 to 60.39)" in first.words


def test_a_gain_in_class_order_is_all_transductive():
    said = words("all transductive", made())
    assert "in class order it has 96.39 % at k = 10, its best: +36.96 points" in said
    assert "All of this gain is transductive, and nothing of it survives for a single picture" in said
    assert "the rest of a group of 10, of which 100.0 % are of the picture's class" in said
    assert "0 of 10,000 answers are not the plain ones" in said


def test_the_best_k_is_the_one_that_is_spoken_of():
    rows = made(row(3, 2, 9900, p=0.0, p_voting=1e-9))
    assert "99.00 % at k = 2" in words("all transductive", rows)
    assert "it has 55.00 % over 3 orders" in words("shuffled harms", rows)
    assert "over the same groups has 70.00 %, less than with the noise (p = 1.0e-09)" in words("voting does less", rows)


@pytest.mark.parametrize(
    ("counts", "ps", "kind", "said"),
    [
        ((2823, 2850, 2800), SURE, "shuffled harms", "-31.19 points, it harms"),
        ((5942, 5942, 5942), (1.0, 1.0, 1.0), "shuffled neutral", "-0.01 points, not told apart from none"),
        ((5943, 5943, 5942), (1.0, 1.0, 1.0), "shuffled neutral", ": 0.00 points, not told apart from none"),
        ((5600, 5650, 5930), (1e-9, 1e-9, 0.3), "shuffled neutral", "not told apart from none"),
        ((5600, 5650, 6200), SURE, "shuffled neutral", "not told apart from none"),
        ((6500, 6510, 6490), SURE, "shuffled gains", "+5.57 points, which too come from the other pictures"),
        ((2823,), (1e-9,), "shuffled harms", "in one order"),
        ((5980,), (0.2,), "shuffled neutral", "+0.37 points"),
    ],
)
def test_shuffling_is_told_apart_only_where_every_order_is_and_alike(counts, ps, kind, said):
    assert said in words(kind, made(row(4, 10, *counts, seed_ps=ps)))


@pytest.mark.parametrize(
    ("count", "p", "kind"),
    [
        (2000, 1e-9, "mixed classes harm"),
        (5950, 0.6, "mixed classes neutral"),
        (6200, 1e-4, "mixed classes gain"),
    ],
)
def test_what_other_classes_in_a_group_do(count, p, kind):
    assert f"{count / 100:.2f} % (0.0 % class mates)" in words(kind, made(row(5, 10, count, p=p)))


def test_no_gain_has_nothing_to_divide():
    said = words("no gain", made(row(3, 2, 5940, p=0.9), row(3, 10, 5950, p=0.7)))
    assert "+0.07 points, not told apart from none (p = 1.00, Holm's over k). There is no gain to divide" in said


def test_harm_even_in_class_order():
    rows = made(row(3, 2, 5000, p=1e-9), row(3, 10, 5100, p=1e-9))
    said = words("harm in class order", rows)
    assert "51.00 % at k = 10, its best: -8.43 points. Even there it harms" in said
    assert not any(finding.kind.startswith("voting") for finding in verdict(rows))  # no gain that voting could explain


def test_the_best_of_several_k_pays_for_the_search():
    rows = made(row(3, 2, 5950, p=0.9), row(3, 10, 6050, p=0.03))
    assert "+1.07 points, not told apart from none (p = 0.060, Holm's over k)" in words("no gain", rows)
    assert not any(finding.kind.startswith("voting") for finding in verdict(rows))


@pytest.mark.parametrize(
    ("count", "p", "kind", "said"),
    [
        (9790, 1e-9, "voting does it", "97.90 %, more than with the noise (p = 1.0e-09): the gain needs no noise"),
        (9500, 1e-9, "voting does less", "95.00 %, less than with the noise"),
        (
            9645,
            0.4,
            "voting does as much",
            "96.45 %, not told apart from what the noise gets (p = 0.40): the gain comes without",
        ),
        (
            9630,
            0.4,
            "voting does as much",
            "96.30 %, not told apart from what the noise gets (p = 0.40): the gain comes without",
        ),
    ],
)
def test_plain_voting_is_compared_on_the_same_pictures(count, p, kind, said):
    assert said in words(kind, made(row(6, 10, count, p=0.0), row(3, 10, 9639, p=0.0, p_voting=p)))


def test_a_picture_among_others():
    said = words("swayed by mates", made())
    assert "In a group of 10, the rest of one other class, 80.00 % of 500 pictures are answered as that class" in said
    assert "noise off 2.00 % of the same are (p = 1.0e-09)" in said
    rows = made(row(7, 10, 14, n=500, beside=10, measure="answered_b", p=0.13))
    assert "2.80 % of 500" in words("not swayed", rows)
    rows = made(row(7, 10, 2, n=500, beside=10, measure="answered_b", p=0.01))
    assert "0.40 % of 500" in words("not swayed", rows)
    unasked = made(row(7, 10, n=0, remark="not run: no other class has 9 pictures"))
    assert not {"swayed by mates", "not swayed"} & {finding.kind for finding in verdict(unasked)}


@pytest.mark.parametrize(
    ("twin", "p", "kind", "said"),
    [
        (
            5700,
            1e-5,
            "twin better",
            "-2.43 points there (p = 1.0e-05): a gain that survives for a single picture. It is",
        ),
        (5930, 0.71, "twins equal", "-0.13 points there, not told apart from none (p = 0.71): no gain is seen to"),
        (6200, 0.004, "twin worse", "+2.57 points there (p = 0.004): the noisy training came out worse. It is one"),
    ],
)
def test_what_survives_for_a_single_picture(twin, p, kind, said):
    rows = made(row(9, 1, twin, p=p))
    assert said in words(kind, rows)
    assert f"59.43 % here, {twin / 100:.2f} % for the clean twin" in words(kind, rows)
    assert verdict(rows)[-1].kind == kind


def test_nothing_is_said_of_the_noise_where_the_trainings_differ_in_more():
    differing = "beside the noise they differ in epochs 4 here, 2 there"
    said = words("no twins", made(row(9, 1, 5700, p=1e-5, unlike=differing)))
    assert f"-2.43 points there (p = 1.0e-05), but {differing}: this says nothing of the noise." in said
    assert "survives" not in said


def test_without_a_twin_the_question_stays_open():
    assert "was not asked: name the clean twin with --twin" in words("no twin", made())


def test_a_fault_at_k_1_leaves_no_transductive_figure_standing():
    found = verdict(made(row(2, 1, 5940, differing=3)))
    assert [finding.kind for finding in found] == ["per image", "fault", "no twin"]
    assert found[1].words.startswith("FAULT: optimal_q at blocks.5")
    assert "3 of 10000 answers differ" in found[1].words
    assert found[1].words.endswith("No transductive figure here may be used.")


def test_each_noise_has_its_own_sentences():
    other = "circular_shift 0.3 at blocks.1 (during eval, all tokens)"
    more = [replace(r, noise=other) for r in made(row(3, 2, 5940, p=0.9), row(3, 10, 5950, p=0.7)) if r.noise]
    found = [f for f in verdict([*made(), *more]) if f.kind in ("all transductive", "no gain")]
    assert [(f.kind, f.words.split(":")[0]) for f in found] == [("all transductive", NOISE), ("no gain", other)]
    named = [f.words for f in verdict([*made(), *more]) if f.kind.startswith(("shuffled", "mixed", "swayed"))]
    assert [w.split(": ")[0] for w in named] == [NOISE] * 3 + [other] * 3
    assert named[0].startswith(f"{NOISE}: shuffled, at the same k")
