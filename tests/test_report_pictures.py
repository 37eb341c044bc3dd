"""Grids of sampled pictures: what stands where, that no pixel is smoothed, and that the page of a picture run holds them."""

import base64
import io
import json
import re

import numpy as np
import pytest
from fake_pictures import PROMPTS, SEEDS, SEEN, colour, fake_pictures, write_pictures
from fake_results import fake_results, write_fake_run
from PIL import Image
from rich.console import Console

from hf_clmul.console import print_results
from hf_clmul.report import page as page_module
from hf_clmul.report.page import write_report
from hf_clmul.report.picture_grid import DARK, LIGHT, TILE, alternative_text, figure, grids

CAPTIONS = ["a red seven", "a green one, which has a caption that is far too long to stand beside it"]
Pictures = list[list[Image.Image]]


def pictures(size: int = 8, seeds: int = 3) -> tuple[Pictures, Pictures]:
    """Each picture in one colour that no other has, twice for before and after."""
    before, after = (
        [
            [Image.new("RGB", (size, size), (7 + 20 * (6 * at + 3 * row + seed), 90, 33)) for seed in range(seeds)]
            for row in range(2)
        ]
        for at in range(2)
    )
    return before, after


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def areas(page: np.ndarray, tiles: Pictures) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of each picture, found by its colour, prompts first."""
    found = []
    for tile in (tile for row in tiles for tile in row):
        rows, columns = np.nonzero((page == tile.getpixel((0, 0))).all(-1))
        top, left = rows.min(), columns.min()
        height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        assert len(rows) == height * width, "one full rectangle"
        found.append((int(top), int(left), height, width))
    return found


def test_rows_are_prompts_columns_are_seeds_and_after_is_right_of_before():
    before, after = pictures()
    page = decoded(figure(before, after, CAPTIONS))
    first, second = areas(page, before), areas(page, after)
    assert all(area[2:] == (TILE, TILE) for area in first + second)
    for block in (first, second):
        assert len({top for top, *_ in block[:3]}) == 1 and block[0][0] + TILE < block[3][0]
        assert [left for _, left, *_ in block[:3]] == sorted(left for _, left, *_ in block[:3])
        assert [left for _, left, *_ in block[:3]] == [left for _, left, *_ in block[3:]]
    assert max(left for _, left, *_ in first) + TILE < min(left for _, left, *_ in second)
    assert [top for top, *_ in first] == [top for top, *_ in second]


@pytest.mark.parametrize(("size", "expected"), [(8, 96), (20, 80), (96, 96), (200, 96)])
def test_small_pictures_grow_by_whole_pixels_and_large_ones_shrink(size, expected):
    before, after = pictures(size, seeds=1)
    assert {area[2:] for area in areas(decoded(figure(before, after, CAPTIONS)), after)} == {(expected, expected)}


def test_no_pixel_is_smoothed():
    red, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (128, 128, 128))
    for x, y in np.ndindex(8, 8):
        red.putpixel((x, y), (255 * ((x + y) % 2), 0, 0))
    page = decoded(figure([[grey]], [[red]], [""]))
    right = page[-12 - TILE : -12, -12 - TILE : -12]
    assert {tuple(colour) for colour in right.reshape(-1, 3).tolist()} == {(255, 0, 0), (0, 0, 0)}
    assert (right[:12, :12] == [0, 0, 0]).all() and (right[:12, 12:24] == [255, 0, 0]).all()


def test_captions_are_drawn_in_the_colours_of_the_page():
    before, after = pictures()
    for (surface, ink), other in ((LIGHT, DARK), (DARK, LIGHT)):
        page = decoded(figure(before, after, CAPTIONS, colours=(surface, ink)))
        assert tuple(page[0, 0]) == tuple(bytes.fromhex(surface[1:]))
        left = areas(page, before)[0][1]
        beside = page[areas(page, before)[0][0] :, : left - 1]
        assert (beside == list(bytes.fromhex(ink[1:]))).all(-1).any()
        assert not (page == list(bytes.fromhex(other[0][1:]))).all(-1).any()
    assert figure(before, after, CAPTIONS) == figure(before, after, CAPTIONS)
    assert figure(before, after, CAPTIONS) != figure(before, after, ["a red one", CAPTIONS[1]])


def test_what_does_not_fit_together_is_refused():
    before, after = pictures()
    other, _ = pictures(size=9)
    ragged = [before[0], before[1][:2]]
    for arguments in (
        (before, after[:1], CAPTIONS), (before, after, CAPTIONS[:1]), (before, other, CAPTIONS), (ragged, ragged, CAPTIONS),
        ([before[0], other[0]], [before[0], other[0]], CAPTIONS), ([], [], []),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="as many for each prompt and of one size"):
            figure(*arguments)


def test_the_alternative_text_names_the_prompts():
    assert alternative_text(CAPTIONS, 3) == (
        "Sampled pictures before and after, 3 for each of 2 prompts: " + "; ".join(CAPTIONS)
    )
    assert alternative_text([f"p{i}" for i in range(14)], 1).endswith("p10; p11; and 2 more")


def found_colours(png: bytes) -> list[list[tuple[int, int, int]]]:
    """Of the pictures of a grid, by rows from left to right."""
    page = decoded(png)
    ours = {
        colour(at, group, i, seed) for at in range(3) for group in PROMPTS for i in range(4) for seed in range(SEEDS)
    }
    rows: dict[int, dict[int, tuple[int, int, int]]] = {}
    for one in ours:
        where = np.nonzero((page == one).all(-1))
        if len(where[0]) == TILE * TILE:
            rows.setdefault(int(where[0].min()), {})[int(where[1].min())] = one
    return [[row[left] for left in sorted(row)] for _, row in sorted(rows.items())]


def test_the_grid_has_the_prompts_to_forget_first_then_those_to_keep(tmp_path):
    (grid,) = grids(write_pictures(tmp_path), fake_pictures())
    assert grid.captions == (*PROMPTS["forget"], *PROMPTS["retain"])
    assert grid.titles == ("before unlearning", "after unlearning seven")
    expected = [
        [colour(at, group, i, seed) for at in (0, 1) for seed in range(SEEDS)]
        for group, prompts in PROMPTS.items()
        for i in range(len(prompts))
    ]
    assert found_colours(grid.png(LIGHT)) == found_colours(grid.png(DARK)) == expected
    assert "2 prompts of the forget group; 4 prompts of the retain group" in grid.caption


def test_of_many_prompts_some_from_all_over_are_shown(tmp_path):
    run = write_pictures(tmp_path)
    for path in run.rglob("examples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        many = [{**rows[0], "caption": f"p{i:02}"} for i in range(40)] + [
            {**rows[-1], "caption": f"k{i:02}"} for i in range(36)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in many))
    (grid,) = grids(run, fake_pictures())
    assert grid.captions == (
        "p00", "p05", "p10", "p15", "p20", "p25", "p30", "p35", "k00", "k06", "k12", "k18", "k24", "k30",
    )  # fmt: skip


def sequence(count):
    results = fake_pictures()
    base, unlearn = results["stages"]
    results["stages"] = [
        base,
        *({**unlearn, "stage": f"{i:02}-unlearn-x{i}", "title": f"after {i}"} for i in range(count)),
    ]
    return results


def test_of_a_few_unlearn_requests_each_has_a_grid(tmp_path):
    results = sequence(2)
    whole, first, second = grids(write_pictures(tmp_path, results), results)
    assert (whole.titles, first.titles, second.titles) == (
        ("before unlearning", "after 1"), ("before unlearning", "after 0"), ("after 0", "after 1"),
    )  # fmt: skip
    assert first.captions == second.captions == tuple(PROMPTS["forget"])
    assert found_colours(second.png(LIGHT))[0] == [
        colour(at, "forget", 0, seed) for at in (1, 2) for seed in range(SEEDS)
    ]
    assert len({grid.name for grid in (whole, first, second)}) == 3
    many = sequence(5)
    assert len(grids(write_pictures(tmp_path, many), many)) == 1


def test_what_is_no_longer_there_is_left_out(tmp_path, bare):
    run, results = write_pictures(tmp_path), fake_pictures()
    path = run / "base" / "examples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[3]
    rows[0]["pictures"] = "(erased)"
    rows[1]["pictures"] = rows[1]["pictures"][:2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (grid,) = grids(run, results)
    assert grid.captions == ("a blue seven", "a red one", "a red three", "a red four")
    assert {len(row) for row in (*grid.before, *grid.after)} == {2}
    path.unlink()
    assert grids(run, results) == [] and 'id="pictures"' not in write_report(run).read_text()


@pytest.fixture
def bare(monkeypatch):
    """Pages without the figures that take seconds to draw."""
    for name in ("_bars", "_trainings"):
        monkeypatch.setattr(page_module, name, lambda *arguments: [])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(write_pictures(tmp_path_factory.mktemp("run"))).read_text()


def test_the_page_holds_the_grid_for_light_and_dark(page):
    section = re.search(r'<section aria-labelledby="pictures">.*?</section>', page, re.DOTALL)[0]
    found = [base64.b64decode(uri) for uri in re.findall(r"data:image/png;base64,([^\"]+)", section)]
    assert [tuple(decoded(png)[0, 0]) for png in found] == [tuple(bytes.fromhex(c[0][1:])) for c in (LIGHT, DARK)]
    assert (
        section.count(
            'alt="Sampled pictures before unlearning and after unlearning seven, 3 for each of 6 prompts: a red'
        )
        == 2
    )
    assert ".sampled figure img { width: auto; max-width: 100%; }" in page


def test_a_picture_run_speaks_of_no_answers_and_tells_what_is_seen(page):
    words = re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert "answer" not in words.lower() and "question" not in words.lower() and "AutoModel" not in words
    section = re.search(r'<section aria-labelledby="seen">.*?</section>', page, re.DOTALL)[0]
    for part in (*PROMPTS["forget"], *PROMPTS["retain"], *SEEN.values()):
        assert part in section
    assert 'href="#seen"' in page and 'id="seen"' in page
    assert "<dd>StableDiffusionPipeline</dd>" in page and "<dd>unet</dd>" in page
    missing = [image for image in re.findall(r"<img[^>]*>", page) if 'src="data:image/png;base64,' not in image]
    assert missing == []


def test_captions_are_text_and_beside_the_page_lies_a_file(tmp_path, bare):
    run = write_pictures(tmp_path)
    for path in run.rglob("examples.jsonl"):
        path.write_text(path.read_text().replace("a red seven", "<b>a</b> seven"))
    page = write_report(run).read_text()
    assert "&lt;b&gt;a&lt;/b&gt; seven" in page and "<b>" not in page
    assert decoded((run / "report" / "pictures.png").read_bytes()).any()


def test_a_text_run_has_neither_pictures_nor_what_is_seen(tmp_path, bare):
    page = write_report(write_fake_run(tmp_path, fake_results())).read_text()
    assert 'id="pictures"' not in page and 'id="seen"' not in page and 'id="answers"' in page


def test_without_a_classifier_nothing_is_said_to_be_seen(tmp_path, bare):
    results = fake_pictures()
    for stage in results["stages"]:
        for group in stage["groups"].values():
            group["metrics"] = {"prompt_accuracy": None, "frechet_distance": None}
            for sample in group["samples"]:
                sample["generated"] = ""
    page = write_report(write_pictures(tmp_path, results)).read_text()
    assert 'id="seen"' not in page and 'id="pictures"' in page


def test_the_console_tells_what_is_seen():
    console = Console(width=120, record=True, file=io.StringIO())
    print_results(fake_pictures(), console)
    text = console.export_text()
    assert "what the classifier sees" in text and "7 x one red" in text and "answer" not in text.lower()
    assert "UA" in text and "IRA near" in text
