"""Pages, tables and plots of results.

- `document`: the blocks of a page, written as HTML or Markdown from jinja2 templates.
- `plots`: plots as SVG files. `tables`: numbers and tables as plain text.
- `run`: the page of a run. `comparison`: the text and page of a comparison. The page of
  a study is in `fibopolicy.study.report`.
"""
