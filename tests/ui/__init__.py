"""The live page and `penstock top`, before the gateway as production makes it.

browser.py   headless Chromium over the DevTools protocol
house.py     a gateway before a simulated provider, and load for it
"""
