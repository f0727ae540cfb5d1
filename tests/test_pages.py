"""The pages: what they link to and show is committed, and what they name exists."""

import re
import subprocess
from pathlib import Path

import pytest

import trainECAPAModel
from tools import read_scores

ROOT = Path(__file__).parents[1]


def committed_files():
    """Paths, relative to the repository, of the files that git tracks."""
    command = ['git', 'ls-files', '-z']
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip('this copy is not a git repository')
    return set(listing.stdout.split('\0'))


def without_code(text):
    """A page without blocks of code, in which brackets are not links and # is not a title."""
    return re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Anchors that GitHub makes of a page's titles."""
    titles = re.findall(r'^#+ (.*)$', without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def links(page):
    """Targets of a page's links and pictures within the repository."""
    targets = re.findall(r'\]\(([^)\s]+)\)', without_code(page.read_text()))
    return [target for target in targets if '://' not in target]


def broken_links(page, files):
    """Targets whose file is not in `files`, or whose anchor its page does not have."""
    broken = []
    for target in links(page):
        name, _, anchor = target.partition('#')
        path = (page.parent / name).resolve() if name else page
        path_in_repository = str(path.relative_to(ROOT))
        is_folder = any(file.startswith(f'{path_in_repository}/') for file in files)
        known = is_folder or path_in_repository in files
        if not known or (anchor and anchor not in anchors(path)):
            broken.append(f'{page.relative_to(ROOT)}: {target}')
    return broken


def test_every_link_anchor_and_picture_of_a_page_is_committed():
    files = committed_files()
    pages = [ROOT / name for name in files if name.endswith('.md')]
    assert len(pages) >= 4
    assert sum(len(links(page)) for page in pages) > 20
    assert [broken for page in pages for broken in broken_links(page, files)] == []


def test_a_missing_picture_and_a_misspelt_anchor_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    page = tmp_path / 'page.md'
    page.write_text('# A title\n[a](#a-title) [b](#b-title) ![c](c.png) [d](https://d.org#e)\n')
    assert broken_links(page, {'page.md'}) == ['page.md: #b-title', 'page.md: c.png']


def test_the_pages_and_titles_that_code_and_recipes_name_exist():
    """`exps/README.md, "Title"` in a comment or message."""
    files = committed_files()
    named = re.compile(r"""([\w/]+\.md), ["']([^"']+)["']""")
    found = 0
    for name in files:
        if not name.endswith(('.py', '.txt', '.sh')) or name == 'tests/test_pages.py':
            continue
        # A sentence goes on after a line's end and a comment's sign.
        text = re.sub(r'\s*\n\s*#?\s*', ' ', (ROOT / name).read_text(errors='ignore'))
        for page, title in named.findall(text):
            titles = re.findall(r'^#+ (.*)$', (ROOT / page).read_text(), re.MULTILINE)
            assert title in titles, f'{name} names {page}, {title}'
            found += 1
    assert found >= 4


def test_the_table_of_a_normal_training_is_the_published_curve():
    text = (ROOT / 'README.md').read_text()
    section = text.partition('### Is my training normal?')[2].partition('\n#')[0]
    rows = re.findall(
        r'^\| (\d+) \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) % \|$', section, re.MULTILINE
    )
    table = {int(epoch): tuple(map(float, figures)) for epoch, *figures in rows}

    curve = {}
    for epoch, _, loss, accuracy, eer, *_ in read_scores(ROOT / 'exps/pretrain_score.txt'):
        curve[epoch] = (round(loss, 1), round(accuracy), eer)
    assert list(table) == [1, 2, 5, 10, 20, 40, 80]
    assert table == {epoch: curve[epoch] for epoch in table}


def test_every_option_of_the_training_commands_on_the_pages_exists():
    options = trainECAPAModel.make_parser().format_help()
    shown = set()
    for name in ('README.md', 'exps/README.md'):
        text = (ROOT / name).read_text().replace('\\\n', ' ')
        for arguments in re.findall(r'trainECAPAModel\.py (.*)', text):
            shown.update(re.findall(r'(?<= )--[a-z_]+', arguments))
    assert len(shown) > 8
    assert [option for option in shown if f'{option} ' not in options] == []
