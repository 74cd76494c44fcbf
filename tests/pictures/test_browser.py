"""The report in a headless browser: everything clicked, by mouse and by keyboard, wide and narrow, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import permgraph as pg
from permgraph.spec import PermutationSpec
from tests.pictures.models import detours, hostile, stack

WIDE, NARROW = 1280, 400


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens)).mean(1))


TOKENS = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def spec() -> PermutationSpec:
    return pg.auto_spec(Model().eval(), example_inputs=(TOKENS,))


@pytest.fixture(scope="module")
def report(spec: PermutationSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    a, b = Model().eval(), Model().eval()
    fit = pg.align(a, b, spec=spec)

    def evaluate(net: nn.Module) -> dict[str, float]:
        return {"loss": float(net(TOKENS).square().sum()), "accuracy": 0.5}

    lines = {"as given": pg.barrier(a, b, evaluate, 3), "aligned": pg.barrier(a, fit.model(), evaluate, 3)}
    path = tmp_path_factory.mktemp("report") / "report.html"
    pg.report(spec, path, alignment=fit, models=(a, b), barrier=lines, about={"A": "a.pt", "B": "b.pt"})
    return path


Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Open a page; at the end nothing may have been said on its console."""
    contexts, said = [], []

    def visit(path: Path, width: int = WIDE, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not said


CLICK_ALL = """async (key) => {
    const panel = document.getElementById(key);
    let clicks = 0;
    const click = (element) => { element.click(); clicks++; };
    const all = (within, which) => [...within.querySelectorAll(which)].filter((element) => element.offsetParent);
    all(panel, ".tools button").forEach(click);  // opens all, closes all
    for (let closed; (closed = all(panel, ".module[aria-expanded=false]")).length;) closed.forEach(click);
    all(panel, "summary").forEach(click);
    await new Promise((resolve) => setTimeout(resolve, 50));  // what they hold is made when the browser says so
    all(panel, ".more").forEach(click);
    for (const [at, element] of all(panel, ".chip, .goto").entries()) {
        click(element);
        if (at % 12 === 0) {  // what the detail holds goes elsewhere, so that everything in it is a thousand clicks
            const aside = document.querySelector("aside");
            all(aside, "summary, .more").forEach(click);
            all(aside, ".goto").slice(-1).forEach(click);
            all(aside, ".close").forEach(click);
        }
        if (panel.hidden) document.getElementById(`tab-${key}`).click();
    }
    all(panel, ".module").reverse().forEach(click);
    return clicks;
}"""


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_element_can_be_clicked(report: Path, visit: Open, width: int, scheme: str) -> None:
    page = visit(report, width, scheme)
    clicked = {}
    for tab in page.locator("[role=tab]").all():
        tab.click()
        assert page.locator("[role=tabpanel]:visible").count() == 1
        key = tab.get_attribute("aria-controls")
        clicked[key] = page.evaluate(CLICK_ALL, key)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), key
    assert clicked["structure"] > 100
    assert clicked["groups"] >= 17
    assert clicked["still"] > 4
    assert clicked["alignment"] == 1
    assert page.locator(".tree > li > ul:visible").count() == 0  # all closed again


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_covers_what_the_mouse_wants(report: Path, visit: Open, width: int) -> None:
    """Real clicks, which fail where something lies above the element, on one of each kind."""
    page = visit(report, width)
    for wanted in (
        "#theme",
        ".module >> nth=0",
        ".tools button >> nth=0",
        ".tree .chip >> nth=0",
        ".tree .chip >> nth=-2",
        "aside .goto >> nth=0",
        "aside summary >> nth=0",
        "aside .more",
        "aside .close",
        "#tab-groups",
        "#groups .goto >> nth=3",
        "aside .close",
        "#tab-still",
        "#still summary >> nth=0",
        "#still .goto >> nth=0",
        "aside .close",
        "#tab-alignment",
        "#alignment summary",
        "#tab-line",
    ):
        page.locator(wanted).click()


def compare_explanations(page: Any, spec: PermutationSpec) -> int:
    """Choose every axis; links, their order, the operators on the way and the reasons must be those of `explain`."""
    page.get_by_role("button", name="Open all").click()
    compared = 0
    for name, axes in spec.axes.items():
        for dim in range(len(axes)):
            for part in spec.explain(name, dim).parts:
                if not part.group and part.size == 1:
                    continue
                said = page.evaluate(
                    """([prefix, wanted]) => {
                        [...document.querySelectorAll(".tree .chip")].find((chip) =>
                            chip.ariaLabel.startsWith(prefix) && chip.ariaLabel.includes(wanted)).click();
                        const words = (which) => [...document.querySelectorAll(which)].map((item) => item.textContent);
                        return {
                            title: document.querySelector("aside h2").textContent,
                            links: [...document.querySelectorAll("aside .links > li")].map((li) => [
                                li.querySelector(".goto").textContent,
                                [...li.querySelectorAll(".path li")].map((step) => step.textContent)]),
                            reason: document.querySelector("aside .reason")?.textContent ?? null,
                            reached: words("aside > details .path li"),
                        };
                    }""",
                    [f"{name}[{dim}]", f"group {part.group} of" if part.group else "put"],
                )
                assert said["title"] == f"{name}[{dim}]"
                assert said["links"] == [
                    [link.slot, str(link).partition(" by ")[2].split(", ") if " by " in str(link) else []]
                    for link in part.links[:25]
                ]
                assert said["reason"] == (part.pin.reason if part.pin else None)
                reached = "".join(part.lines()).partition(", reached by ")[2] if part.pin else ""
                assert ", ".join(said["reached"]) == reached
                compared += 1
                page.keyboard.press("Escape")  # or a second click on the same chip would close it
    return compared


def test_an_axis_tells_what_the_spec_tells(report: Path, visit: Open, spec: PermutationSpec) -> None:
    assert compare_explanations(visit(report), spec) > 80


def test_ways_and_reasons_are_those_of_the_spec(tmp_path: Path, visit: Open) -> None:
    path = tmp_path / "detours.html"
    pg.report(detours(), path)
    assert compare_explanations(visit(path), detours()) == 4


def test_the_keyboard_reaches_everything(report: Path, visit: Open) -> None:
    page = visit(report)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = false })")
    reached = set()
    for _ in range(400):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            """() => {
                const element = document.activeElement;
                if (element === document.body) return null;
                const style = getComputedStyle(element);
                return [[...document.querySelectorAll("*")].indexOf(element), style.outlineStyle, style.outlineWidth];
            }"""
        )
        if seen is None or seen[0] in reached:
            break
        reached.add(seen[0])
        assert seen[1] == "solid" and seen[2] == "2px", "what has the focus must show it"
    visible = page.evaluate(
        """() => [...document.querySelectorAll("button, input, summary, [tabindex='0']")].filter((element) =>
            element.offsetParent !== null && element.tabIndex >= 0).length"""
    )
    assert len(reached) == visible > 20


def test_keys_walk_through_tabs_and_tree(report: Path, visit: Open) -> None:
    page = visit(report)

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.textContent"))

    page.locator("#tab-structure").focus()
    for key, expected in (
        ("ArrowRight", "tab-groups"),
        ("End", "tab-line"),
        ("ArrowRight", "tab-structure"),
        ("ArrowLeft", "tab-line"),
        ("Home", "tab-structure"),
    ):
        page.keyboard.press(key)
        assert focused() == expected
        assert page.locator("[role=tab][aria-selected=true]").get_attribute("id") == expected
    page.get_by_role("button", name="Close all").click()
    first = page.locator(".tree > .branch > .module").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert first.get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowRight")
    assert focused() == "11"  # the rows of the embedding, which stay put
    page.keyboard.press("ArrowRight")
    assert focused() == "embed"
    page.keyboard.press("Enter")
    assert "embed.weight[1]" in page.locator("aside h2").inner_text()
    page.keyboard.press("Escape")
    assert focused() == "embed"
    assert "Choose an axis" in page.locator("aside").inner_text()
    page.keyboard.press("ArrowDown")
    assert focused().startswith("blocks")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert first.get_attribute("aria-expanded") == "false"


def test_a_link_opens_the_layers_around_it(report: Path, visit: Open) -> None:
    page = visit(report)
    page.locator("#tab-groups").click()
    page.locator("#groups .goto", has_text="blocks.3.up").click()
    chip = page.locator(".chip[aria-pressed=true]:visible").first
    assert "blocks.3.up.weight" in (chip.get_attribute("aria-label") or "")
    assert page.evaluate("document.activeElement.classList.contains('chip')")
    page.locator("aside .goto").last.click()
    assert page.locator("aside h2").inner_text() == "blocks.3.down.weight[1]"


def test_layers_alike_are_one_line(report: Path, visit: Open) -> None:
    page = visit(report)
    page.get_by_role("button", name="Open all").click()
    run = page.locator(".module", has_text="1 … 3")
    assert "3 like 0" in run.inner_text()
    page.get_by_role("button", name="Close all").click()
    assert page.locator(".tree li:visible").count() == 3


def test_finding(report: Path, visit: Open, spec: PermutationSpec) -> None:
    page = visit(report)
    page.fill("#search", "DOWN.weight")
    assert page.locator(".found .parameter").count() == sum("down.weight" in name for name in spec.axes) == 4
    assert f"4 of {len(spec.axes)}" in page.locator("[role=status]").inner_text()
    page.fill("#search", "blocks.2.up")  # a group, so that what it acts on elsewhere is found too
    names = page.locator(".found .name").all_inner_texts()
    assert names == ["blocks.2.up.weight", "blocks.2.up.bias", "blocks.2.down.weight"]
    page.fill("#search", "nothing of that name")
    assert page.locator(".found li").count() == 0
    page.fill("#search", "")
    assert page.locator(".tree").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(report: Path, visit: Open, scheme: str) -> None:
    """Text has the contrast that WCAG asks for (4.5 to 1), in both themes and however they are chosen."""
    page = visit(report, scheme=scheme)
    contrasts = """() => {
        const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            return canvas.getImageData(0, 0, 1, 1).data; };
        const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
        const behind = (element) => { for (; element; element = element.parentElement) {
            const colour = rgb(getComputedStyle(element).backgroundColor); if (colour[3]) return colour; } };
        return [...document.querySelectorAll("button, p, dt, dd, th, td, .name, .shape, .mark, h1, h2, summary")]
            .filter((element) => element.offsetParent && element.textContent.trim())
            .map((element) => { const [x, y] = [light(rgb(getComputedStyle(element).color)), light(behind(element))];
                return [(Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05), element.className || element.tagName]; })
            .sort((one, other) => one[0] - other[0])[0];
    }"""
    backgrounds = []
    for _ in range(3):
        for tab in page.locator("[role=tab]").all():
            tab.click()
            page.mouse.move(0, 0)
            worst = page.evaluate(contrasts)
            assert worst[0] >= 4.5, worst
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator("#theme").click()
    assert len(set(backgrounds)) == 2
    assert backgrounds[0] == backgrounds[1 if scheme == "light" else 2]
    assert page.locator("#theme").inner_text() == "Theme: system"


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_choosing_moves_nothing(report: Path, visit: Open, width: int) -> None:
    page = visit(report, width)
    places = """() => [...document.querySelectorAll(".tree > li, header, [role=tablist]")]
        .map((element) => element.getBoundingClientRect().y)"""
    before = page.evaluate(places)
    page.evaluate("document.querySelector('.tree .chip').click()")
    assert page.locator("aside .close").is_visible()
    assert page.evaluate(places) == before
    page.locator("aside .close").click()
    assert page.evaluate(places) == before


def test_names_that_are_out_to_do_harm(tmp_path: Path, visit: Open) -> None:
    path = tmp_path / "hostile.html"
    pg.report(hostile(), path)
    page = visit(path, NARROW)
    page.get_by_role("button", name="Open all").click()
    for tab in page.locator("[role=tab]").all():
        tab.click()
        for summary in page.locator("summary:visible").all():
            summary.click()
    page.locator("#tab-structure").click()
    for chip in page.locator(".chip:visible").all():
        chip.click()
        page.keyboard.press("Escape")
    assert page.evaluate("window.harmed") is None
    assert page.locator("img").count() == 0
    assert page.locator("b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_policy_keeps_other_scripts_from_running(tmp_path: Path, browser: Any) -> None:
    """Even if a name became markup, the browser would not run it."""
    path = tmp_path / "broken.html"
    page_text = pg.report(stack()).html
    path.write_text(page_text.replace("<main>", "<main><script>window.harmed=1</script><img src=x onerror='harmed=1'>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.locator(".chip").count() > 0
    assert page.evaluate("window.harmed") is None
    page.close()


def test_a_notebook_s_frame_works(tmp_path: Path, visit: Open) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f'<!doctype html><link rel="icon" href="data:,"><body>{pg.report(stack())._repr_html_()}</body>')
    frame = visit(path).frame_locator("iframe")
    frame.locator(".chip").first.click()
    assert "embed.weight" in frame.locator("aside h2").inner_text()


def test_a_spec_without_reasons_and_an_empty_one(tmp_path: Path, visit: Open) -> None:
    for number, spec in enumerate((stack(2), PermutationSpec(groups={}, axes={}))):
        path = tmp_path / f"{number}.html"
        pg.report(spec, path)
        page = visit(path)
        for chip in page.locator(".chip:visible").all():
            chip.click()
            assert page.locator("aside").inner_text()
        if not spec.axes:
            assert "no parameters" in page.locator("#structure").inner_text()
