"""The site: it is built without a warning, needs nothing from elsewhere, and has every public name and every page."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
config = pytest.importorskip("mkdocs.config", reason="the site needs the extra `docs`")
pytest.importorskip("material", reason="the site needs the extra `docs`")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. A broken link, an unknown name or a page with errors ends the build."""
    from mkdocs.commands.build import build

    folder = tmp_path_factory.mktemp("site")
    settings = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert settings.strict
    settings.plugins.on_startup(command="build", dirty=False)
    build(settings)
    settings.plugins.on_shutdown()
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(pages):
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"(https?:[^\"]*)", page)
        loaded += [tag for tag in re.findall(r"<link\b[^>]*>", page) if "https:" in tag and "canonical" not in tag]
        assert loaded == [], name


def test_formulas_need_no_script(pages):
    assert 'class="arithmatex"' not in "".join(pages.values())
    assert pages["index.html"].count("<math") == 1


@pytest.mark.parametrize(
    "part",
    [
        "trainers",
        "posterior",
        "lm",
        "likelihoods",
        "rewards",
        "samplers",
        "diagnostics",
        "objectives",
        "store",
        "numerics",
    ],
)
def test_every_public_name_is_in_the_reference(pages, part):
    module = importlib.import_module(f"rlhf_bayes.{part}")
    public = getattr(module, "__all__", None)
    if public is None:
        public = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        public = [name for name in public if not name.startswith("_")]
    shown = set(re.findall(r'id="rlhf_bayes[\w.]*\.(\w+)"', pages[f"api/{part}.html"]))
    assert set(public) - shown == set()


def test_every_page_is_in_the_menu(pages):
    menu = set(re.findall(r'<a href="([^"#]+)" class="md-nav__link', pages["index.html"]))
    assert {name for name in pages if name not in ("404.html", "index.html")} - menu == set()
