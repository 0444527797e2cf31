"""The assembled gateway on loopback, started as production starts it and driven from outside.

running.py    the gateway, how to ask it, and what it counted
scripted.py   an upstream over raw TCP that plays a script
wire.py       a client over raw TCP that sees every byte, and can leave as rudely as it likes
"""
