"""Patterns of client code that people copy from articles, and the few lines that remain of each behind a gateway.

    python -m examples              all of them, each against a simulated provider, without and with the gateway
    python -m examples gather       one of them

Each file has two functions: `copied`, which talks to the provider, and `through`, which talks to the gateway. Both
take the address to talk to and return what was answered, or the error in its place, in the order of what was asked.
"""
