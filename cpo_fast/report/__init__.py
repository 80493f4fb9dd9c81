"""One HTML file of one or several runs, which opens from disk without a network: `cpo-fast report`.

It reads run folders only (`runs`) and loads no model. `page.write_report` puts it together, which needs jinja2.
"""
