"""``python -m mmpeft.bench.published``: the list in docs/en/published.md."""
from . import render_cells

if __name__ == '__main__':
    print(render_cells())
