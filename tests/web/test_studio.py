"""The page in a real browser, used and misused."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from helpers.studio_requests import fetched, refused, values
from mezzotint.core.image_grid import to_pil
from mezzotint.models import open_model
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.prompts import make_prompts
from mezzotint.sampling.settings import SamplingSettings

SEEDS = "#seeds :is(textarea, input)"
IMAGES = "#pictures figure:has([data-save]) img"


def press_generate(page, seeds: str, steps: int = 3) -> None:
    page.locator(SEEDS).fill(seeds)
    box = page.get_by_label("number input for Steps").first
    box.fill(str(steps))
    box.press("Tab")
    page.click("#generate")


def choose(page, model: str) -> None:
    page.get_by_role("combobox", name="Model").first.click()
    page.get_by_role("option", name=model, exact=True).click()
    page.wait_for_timeout(500)


def wait_done(page, seconds: float = 60) -> list[str]:
    """Wait for the status "done"; return the sources of the finished images."""
    page.wait_for_function(
        "() => document.querySelector('#status').innerText.startsWith('done')",
        timeout=1000 * seconds,
    )
    return [image.get_attribute("src") for image in page.query_selector_all(IMAGES)]


def generate(page, seeds: str, steps: int = 3) -> list[str]:
    """Press Generate, and wait until the page shows more finished images than before."""
    before = page.locator("[data-save]").count()
    press_generate(page, seeds, steps)
    page.wait_for_function(
        "n => document.querySelectorAll('[data-save]').length > n", arg=before, timeout=60_000
    )
    return wait_done(page)


def decoded(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_images_equal_the_librarys_and_a_reused_seed_gives_the_same_bytes(visit, server, shot):
    page = visit()
    first = generate(page, "4-6")
    assert len(set(first)) == 3
    shot(page, "generate")
    model = open_model(server.folder / "good")
    job = SamplingJob(model=model, settings=SamplingSettings(steps=3), classes=(0, 1, 2))
    for uri, image in zip(first, job.draw([4, 5, 6]), strict=True):
        assert np.array_equal(np.array(decoded(uri)), np.array(to_pil(image)))
    card = json.loads(decoded(first[1]).text["mezzotint"])
    expected = {"first_seed": 5, "num_images": 1, "steps": 3}
    assert {key: card[key] for key in expected} == expected
    assert card["sampler"]["name"] == "ddim"
    page.click("#pictures .mz-tools [data-seed='5']")
    page.wait_for_function(
        "() => document.querySelector('#seeds :is(textarea, input)').value === '5'"
    )
    assert generate(page, "5") == [first[1]]
    assert page.locator("#earlier figure").count() == 3


def test_interpolation_and_variations(visit):
    page = visit()
    page.get_by_text("Between two seeds").click()
    page.click("#interpolate")
    page.wait_for_function(
        "() => document.querySelector('#status').innerText.includes('great arc')", timeout=60_000
    )
    assert page.locator("#strip figure").count() == 7
    page.get_by_text("One seed, several settings").click()
    page.click("#vary")
    page.wait_for_function(
        "() => document.querySelectorAll('#strip [data-save]').length === 4", timeout=60_000
    )
    assert len({i.get_attribute("src") for i in page.query_selector_all("#strip img")}) == 4


def test_stop_ends_the_computation(visit):
    page = visit()
    press_generate(page, "0-15", 250)
    page.wait_for_selector("#status progress")
    page.click("#stop")
    page.wait_for_function("() => document.querySelector('#status').innerText === 'stopped'")
    page.wait_for_timeout(
        1000
    )  # the page ignores a press while it is still closing the cancelled request
    before = time.monotonic()
    assert len(generate(page, "1")) == 1
    assert time.monotonic() - before < 15
    assert page.locator("#status").inner_text().startswith("done")


def test_a_photo_is_noised_and_other_files_are_refused(visit, tmp_path, shot):
    page = visit()
    page.get_by_role("tab", name="Understand").click()
    shown = page.locator("#noised img").first
    shown.wait_for()
    before = shown.get_attribute("src")
    Image.new("RGB", (300, 200), (250, 20, 20)).save(tmp_path / "red.png")
    page.set_input_files("#photo-file", str(tmp_path / "red.png"))
    page.wait_for_function(
        "b => document.querySelector('#noised img').src !== b", arg=before, timeout=30_000
    )
    _, _, body = page.locator("#noised img").nth(3).get_attribute("src").partition(",")
    red, green, _ = np.array(Image.open(io.BytesIO(base64.b64decode(body)))).reshape(-1, 3).mean(0)
    assert red > green + 60
    shot(page, "understand-photo")
    (tmp_path / "no.png").write_text("root:x:0:0")
    page.set_input_files("#photo-file", str(tmp_path / "no.png"))
    page.wait_for_selector("#noised [role=alert]")
    assert "not an image" in page.locator("#noised").inner_text()


def images_seen(page) -> int:
    found = re.match(r"([\d,]+) images seen", page.locator("#watch-status").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def test_watch_follows_a_training_run(visit, training, shot):
    page = visit()
    page.get_by_role("tab", name="Watch").click()
    page.wait_for_selector("#curves svg", timeout=30_000)
    before = images_seen(page)
    seen = before
    training.resume()
    try:
        # Read the line once a turn: it is empty for a moment while the page draws it again.
        end = time.monotonic() + 60
        while seen <= before and time.monotonic() < end:
            page.wait_for_timeout(500)
            seen = images_seen(page)
    finally:
        training.pause()
    assert seen > before > 0
    assert page.locator("#curves svg").count() == 5
    shot(page, "watch")


def brightness(page, expression: str) -> float:
    colour = page.evaluate(f"() => getComputedStyle({expression})")
    return float(np.mean([float(v) for v in re.findall(r"[\d.]+", colour)[:3]]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_theme(visit, scheme, shot):
    page = visit(color_scheme=scheme)
    page.wait_for_timeout(500)
    ground = brightness(page, "document.body).backgroundColor.concat('' ")
    ink = brightness(page, "document.querySelector('.mz-head h1')).color.concat('' ")
    assert (ground < 60 and ink > 180) if scheme == "dark" else (ground > 220 and ink < 80)
    shot(page, f"generate-{scheme}")


def test_a_phone_scrolls_vertically_only(visit, shot):
    page = visit(viewport={"width": 390, "height": 844})
    assert len(generate(page, "0-3")) == 4
    for tab in ("Generate", "Watch", "Understand", "Compare"):
        page.get_by_role("tab", name=tab, exact=True).click()
        if tab == "Watch":
            page.wait_for_selector("#curves svg", timeout=30_000)
        page.wait_for_timeout(1000)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390, tab
        shot(page, f"phone-{tab.lower()}")


@pytest.mark.parametrize("part", ["b", "span"])
@pytest.mark.parametrize("text", ["seed 2 · HerbaceousVegetationOfTheNorthAndSouth", "x" * 200])
def test_long_words_stay_below_their_image(part, text, visit):
    page = visit()
    generate(page, "0-3")
    excess = page.evaluate(
        """([part, text]) => [...document.querySelectorAll('#pictures figcaption')].map(caption => {
            const line = caption.querySelector(part)
            line.textContent = text
            return line.scrollWidth - caption.parentElement.clientWidth
        })""",
        [part, text],
    )
    assert len(excess) == 4
    assert max(excess) <= 0


def test_keyboard_only(visit):
    page = visit()
    page.locator(SEEDS).fill("3")
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#pictures [data-save]", timeout=60_000)
    page.locator("#pictures .mz-pick").focus()
    page.locator(SEEDS).fill("")
    page.locator("#pictures .mz-pick").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('#seeds :is(textarea, input)').value === '3'"
    )


def test_two_visitors_get_their_own_images(visit):
    one, two = visit(), visit()
    press_generate(one, "0-7", 30)
    press_generate(two, "8, 9", 3)
    wait_done(one)
    wait_done(two)
    assert one.locator("#pictures [data-save='seed-7.png']").count() == 1
    assert two.locator("#pictures figure").count() == 2
    assert two.locator("#pictures [data-save='seed-9.png']").count() == 1


def test_a_failing_model_reports_its_error_and_the_server_lives(visit, server):
    page = visit()
    choose(page, "broken")
    press_generate(page, "0")
    page.wait_for_selector("#status [role=alert]", timeout=30_000)
    assert "not finite numbers" in page.locator("#status").inner_text()
    choose(page, "good")
    assert len(generate(page, "0")) == 1
    assert server.process.poll() is None


def test_prompts(visit, server, shot):
    page = visit()
    assert not page.get_by_label("Prompts").first.is_visible()
    choose(page, "text")
    prompts = page.get_by_label("Prompts").first
    prompts.fill("a red ring\n\na blue square")
    assert not page.get_by_label("Class").first.is_visible()
    images = generate(page, "0-1")
    shot(page, "generate-prompts")
    settings = SamplingSettings(steps=3)
    job = SamplingJob(
        model=open_model(server.folder / "text"),
        settings=settings,
        prompts=make_prompts(("a red ring", "a blue square"), None),
    )
    for uri, image in zip(images, job.draw([0, 1]), strict=True):
        assert np.array_equal(np.array(decoded(uri)), np.array(to_pil(image)))
    assert json.loads(decoded(images[0]).text["mezzotint"])["prompts"] == [
        "a red ring",
        "a blue square",
    ]
    assert "a blue square" in page.locator("#pictures figure").nth(1).inner_text()
    choose(page, "good")
    prompts.wait_for(state="hidden")
    assert len(generate(page, "0")) == 1  # the other model's prompts are not sent


def test_an_absent_text_encoder_is_reported(visit):
    page = visit()
    choose(page, "no-encoder")
    page.get_by_label("Prompts").first.fill("a red ring")
    press_generate(page, "0")
    page.wait_for_selector("#status [role=alert]")
    assert "download nobody/has-this-t5" in page.locator("#status").inner_text()


def test_compare_two_models(visit, shot):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare")
    page.wait_for_function(
        "() => document.querySelector('#compare-status').innerText.startsWith('done')",
        timeout=90_000,
    )
    columns = [
        [i.get_attribute("src") for i in s.query_selector_all("img")]
        for s in page.query_selector_all("#pairs section")
    ]
    assert [len(c) for c in columns] == [4, 4]
    assert not set(columns[0]) & set(columns[1])
    shot(page, "compare")


@pytest.mark.parametrize(
    ("tab", "part", "rows"),
    [("DiMR's branches", "branches", 3), ("DiffiT's attention", "attention", 2)],
)
def test_branches_and_attention_at_every_step(visit, shot, tab, part, rows):
    page = visit()
    page.get_by_role("tab", name="Understand").click()
    page.get_by_role("tab", name=tab).click()
    page.click(f"#{part}-start")
    page.wait_for_selector(f"#{part} .mz-rows", timeout=90_000)
    images = [i.get_attribute("src") for i in page.query_selector_all(f"#{part} img")]
    assert len(images) == 10 * rows  # steps
    assert len(set(images)) > len(images) / 2
    shot(page, part)


def test_a_request_over_the_limits(visit):
    page = visit()
    press_generate(page, "0-99")
    page.wait_for_selector("#status [role=alert]")
    assert "at most 16 images" in page.locator("#status").inner_text()


def log_in(page, password: str) -> None:
    page.get_by_label("username").fill("rembrandt")
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()


def test_a_page_with_a_password(guarded, browser, shot):
    first = fetched(guarded.url)
    assert "password" in first
    assert not any(word in first for word in ("good", "gradio", "rose", "ddim"))
    generate_request = urllib.request.Request(
        f"{guarded.url}/gradio_api/call/generate",
        json.dumps({"data": values()}).encode(),
        headers={"Content-Type": "application/json"},
    )
    paths = ("/config", "/gradio_api/info", "/openapi.json", "/gradio_api/app_id", "/theme.css")
    for request in (generate_request, *(guarded.url + path for path in paths)):
        assert refused(request)[0] == 401
    context = browser.new_context()
    page = context.new_page()
    page.goto(guarded.url)
    log_in(page, "wrong")
    page.get_by_text("Incorrect Credentials").wait_for()
    shot(page, "login")
    assert page.locator("#generate").count() == 0
    log_in(page, "rocker")
    page.wait_for_selector("#generate", timeout=60_000)
    assert len(generate(page, "0")) == 1
    page.goto(f"{guarded.url}/logout")
    page.get_by_label("password").wait_for()
    context.close()
