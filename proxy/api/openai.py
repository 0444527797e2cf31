"""OpenAI's endpoints: the calls the gateway understands."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.api import models, passthrough
from proxy.api.calling import creating, uploading
from proxy.api.dialects import OPENAI
from proxy.api.edge import Endpoint, Visit
from proxy.api.stored import Stored
from proxy.plan import Plan
from proxy.relay import Runs

_PAINTER = "dall-e-2"  # the model of images whose request names none; so OpenAI's reference has it


def endpoints(relay: Runs, stored: Stored) -> dict[str, Endpoint]:
    """By path, for the edge."""
    beside = {"GET": passthrough.handler(relay, stored, OPENAI)}
    return {
        **creating(relay, OPENAI, "chat", "/v1/chat/completions", reports_usage=True, beside=beside, stored=stored),
        **creating(relay, OPENAI, "completions", "/v1/completions", reports_usage=True),
        **creating(relay, OPENAI, "embeddings", "/v1/embeddings"),
        **creating(relay, OPENAI, "responses", "/v1/responses", stored=stored, stores=True),
        **creating(relay, OPENAI, "responses", "/v1/responses/compact", stored=stored, stores=True),
        **creating(relay, OPENAI, "moderations", "/v1/moderations", otherwise="omni-moderation-latest"),
        **creating(relay, OPENAI, "images", "/v1/images/generations", otherwise=_PAINTER),
        **uploading(relay, OPENAI, "images", "/v1/images/edits", _PAINTER),
        **uploading(relay, OPENAI, "images", "/v1/images/variations", _PAINTER),
        **creating(relay, OPENAI, "audio", "/v1/audio/speech"),
        **uploading(relay, OPENAI, "audio", "/v1/audio/transcriptions"),
        **uploading(relay, OPENAI, "audio", "/v1/audio/translations"),
        **models.endpoints(relay, stored, OPENAI, _listed, _described),
    }


def _listed(visit: Visit, names: Sequence[str]) -> dict[str, object]:
    return {"object": "list", "data": [_described(visit.plan, name) for name in names]}


def _described(plan: Plan, model: str) -> dict[str, object]:
    said = plan.settings.models.get(model)
    owner = said.upstreams[0] if said is not None else "penstock"  # a pipeline
    return {"id": model, "object": "model", "created": 0, "owned_by": owner}
