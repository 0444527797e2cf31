"""A provider with real limits, for the demo, the tests and the benchmarks.

    profile.py   what it is like: limits, pace, troubles          profiles.py  ready ones
    meter.py     how it keeps count: buckets and windows          wording.py   what it writes of them
    provider.py  what it decides, as a pure machine in any time   <- read this first
    asks.py      what is asked over HTTP                          answers.py   what is answered
    mould.py     answers of a given shape                         forms.py     forms as they are uploaded
    messages.py  the same of Anthropic's messages; responses.py, images.py, audio.py of OpenAI's
    rooms.py     where things are kept: files.py, responses.py, message_batches.py
    server.py    the endpoints, in real time

One profile, one seed and the same arrivals always make the same run.
"""

from proxy.simulator import profiles
from proxy.simulator.profile import ALWAYS, Change, Period, Profile, Style
from proxy.simulator.provider import Admitted, Fault, Provider, Refused, Size, Stats
from proxy.simulator.server import Seen, Simulator, serving

__all__ = [
    "ALWAYS",
    "Admitted",
    "Change",
    "Fault",
    "Period",
    "Profile",
    "Provider",
    "Refused",
    "Seen",
    "Simulator",
    "Size",
    "Stats",
    "Style",
    "profiles",
    "serving",
]
