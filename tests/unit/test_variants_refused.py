"""ImageNet's variants: what is not as it was published is refused by name."""

from pathlib import Path

import pytest
from small_shards import jpeg
from variant_world import IMAGENET, SOME, WNIDS, evaluated

from pipeline.__main__ import main
from pipeline.variants import RobustnessConfig
from pipeline.variants.classes import synsets
from pipeline.variants.layouts import find_layout, notes_on


@pytest.mark.parametrize(
    ("option", "folder", "message"),
    [
        (
            "imagenet_a",
            "v2",
            r"--imagenet-a .*/v2 holds class indices \(0, 1, 10 and 9 more: ImageNet-V2's layout, give it as --imag",
        ),
        ("imagenet_sketch", "v2", r"--imagenet-sketch .*give it as --imagenet-v2"),
        ("imagenet_v2", "imagenet-a", r"--imagenet-v2 .* holds 7 WordNet ids \(give it as --imagenet-a, -r or -sketch"),
        (
            "imagenet_v2",
            "c/fog",
            r"--imagenet-v2 .*has 5 class indices, without 0, 6, 7 and 4 more; the checkpoint's 12 classes are 0 to 11",
        ),
        (
            "imagenet_a",
            "sketch",
            r"--imagenet-a .*sketch has all 12 classes of the checkpoint, ImageNet-A some alone: is it --imagenet-s",
        ),
        (
            "imagenet_sketch",
            "imagenet-a",
            r"has 7 of the checkpoint's 12 classes, without n00000007.*: unpack all of ImageNet-Sk",
        ),
        (
            "imagenet_a",
            ".",
            r"--imagenet-a .* holds c, empty, imagenet-a and 2 more \(name the one in it that holds the classes",
        ),
        ("imagenet_r", "c", r"--imagenet-r .* holds corruptions \(fog: ImageNet-C's layout, give it as --imagenet-c\)"),
        ("imagenet_r", "c/fog", r"--imagenet-r .* holds severities 1 to 5 \(of one corruption"),
        ("imagenet_a", "empty", r"--imagenet-a .* holds no folders \(unpack the set there\)"),
        ("imagenet_v2", "empty", r"--imagenet-v2 .* holds no folders"),
        ("imagenet_c", "empty", "holds no folders: unpack ImageNet-C there"),
        (
            "imagenet_c",
            "sketch",
            r"--imagenet-c .* holds n00000007, which is no corruption of ImageNet-C: name the folder that holds",
        ),
        ("imagenet_c", "c/fog", r"--imagenet-c .* holds 1, which is no corruption"),
        ("imagenet_c", ".", r"--imagenet-c .* holds c, which is no corruption"),
        ("val", "imagenet-a", r"--val .* has 7 of the checkpoint's 12 classes"),
        ("imagenet_a", "sketch/n00000007", r"lies in no class's folder: name the folder that holds one folder a class"),
    ],
)
def test_a_wrong_layout_is_named_with_its_mend(world, sets, tmp_path, option, folder, message):
    where = sets / folder
    with pytest.raises(ValueError, match=message):
        evaluated(world, tmp_path, **{option: str(where) if option == "val" else where})


def test_a_folder_that_is_not_there(world, tmp_path, capsys):
    assert main(["robustness", "--checkpoint", str(world.run), "--imagenet-a", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/gone does not exist: name the folder that holds one folder a class\n"
    )


def test_classes_that_the_checkpoint_has_not_are_named(world, tmp_path):
    folders = WNIDS | {3: "n09999999"}
    root = world.lay(tmp_path / "a", world.labels(2, [1, 3, 5]), folders, "{}.jpg")
    with pytest.raises(
        ValueError, match=r"has classes that the checkpoint has not \(n09999999\): name ImageNet-A as it"
    ):
        evaluated(world, tmp_path, imagenet_a=root)


@pytest.mark.parametrize(
    ("option", "other", "pictures"), [("imagenet_a", "imagenet_r", 7_500), ("imagenet_r", "imagenet_a", 30_000)]
)
def test_of_imagenet_s_classes_a_and_r_must_have_the_200_published_ones(tmp_path, option, other, pictures):
    """Names alone are looked at here, so folders suffice."""
    names, letter = synsets(option), option[-1]
    for name in names:
        (tmp_path / "whole" / name).mkdir(parents=True)
    layout = find_layout(option, tmp_path / "whole", IMAGENET)
    assert layout.classes == names and [IMAGENET.names[i] for i in layout.columns] == list(names)
    with pytest.raises(
        ValueError, match=rf"has the classes of ImageNet-{letter.upper()}: give it as --imagenet-{letter}"
    ):
        find_layout(other, tmp_path / "whole", IMAGENET)
    (tmp_path / "whole" / names[5]).rmdir()
    extra = next(name for name in IMAGENET.names if name not in names)
    (tmp_path / "whole" / extra).mkdir()
    with pytest.raises(
        ValueError, match=rf"has 200 classes, not the 200 .*\(it lacks {names[5]}; {extra} are not in it"
    ):
        find_layout(option, tmp_path / "whole", IMAGENET)
    assert notes_on(layout, 7_499, IMAGENET) == (
        f"ImageNet-{letter.upper()}: 7,499 pictures, of {pictures:,} that were published",
    )
    assert notes_on(layout, pictures, IMAGENET) == ()


def test_a_checkpoint_of_other_classes_is_refused(world, sets, tmp_path):
    other = world.save("named", tuple(f"class{i}" for i in range(12)))
    with pytest.raises(ValueError, match=r"named has classes that are no WordNet ids \(class0, class1, class2\)"):
        evaluated(world, tmp_path, other, imagenet_v2=sets / "v2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no set to evaluate: give at least one of --val, --imagenet-v2, --imagenet-a, --imagenet-r"),
        ({"real": Path("real.json")}, r"--real real\.json labels the validation set anew: give that as --val"),
        ({"imagenet_a": Path("a"), "batch": 0}, "batch is 0"),
        ({"imagenet_a": Path("a"), "workers": -1}, "workers is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RobustnessConfig(checkpoint=Path("run"), **options)


def test_a_picture_that_cannot_be_decoded_ends_it_by_name(world, tmp_path):
    root = world.lay(tmp_path / "a", world.labels(2, SOME), WNIDS, "{}.jpg")
    bad = next(root.glob("*/17.jpg"))
    bad.unlink()
    bad.write_bytes(jpeg(1)[:300])
    with pytest.raises(ValueError, match=rf"{bad}\): cannot be decoded"):
        evaluated(world, tmp_path, imagenet_a=root)
    assert not (tmp_path / "found.json").exists()
