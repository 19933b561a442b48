"""The report as one HTML file that needs no network: tables, plots and the data behind them.

The plots are written as plain SVG and not drawn by matplotlib: their colours are CSS variables, so
that one picture serves a light and a dark page; their points carry names for a mouse; small panels
flow on a narrow screen; and a plot takes 10 kB, for matplotlib's 100. The page's text comes from a
jinja2 template that escapes what it is given. Importing this package imports neither jinja2 nor
matplotlib.
"""
