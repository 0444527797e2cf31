"""The pages, one module each; `build.PAGES` has them in the order in which they are read."""
