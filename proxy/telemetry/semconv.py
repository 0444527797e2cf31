"""The names of span attributes and events, in one place, because half of them still change.

HTTP, URL, server and error attributes are stable: https://opentelemetry.io/docs/specs/semconv/http/. The `gen_ai` ones
are in development and moved to github.com/open-telemetry/semantic-conventions-genai. `penstock` is ours.
"""

from __future__ import annotations

HTTP_METHOD = "http.request.method"
HTTP_RESEND_COUNT = "http.request.resend_count"
HTTP_ROUTE = "http.route"
HTTP_STATUS = "http.response.status_code"
URL_PATH = "url.path"
URL_FULL = "url.full"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
ERROR_TYPE = "error.type"

GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_STREAM = "gen_ai.request.stream"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_RESPONSE_ID = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_FIRST_CHUNK_SECONDS = "gen_ai.response.time_to_first_chunk"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_CACHE_WRITE_TOKENS = "gen_ai.usage.cache_write.input_tokens"
GEN_AI_REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"

# What the conventions call our operations; the others go by our own word.
GEN_AI_OPERATIONS = {"completions": "text_completion", "responses": "chat", "messages": "chat"}

REQUEST_ID = "penstock.request_id"
KEY = "penstock.key"  # the alias
OUTCOME = "penstock.outcome"
ATTEMPTS = "penstock.attempts"
COST_USD = "penstock.cost_usd"
OVERHEAD_SECONDS = "penstock.overhead_seconds"
PIPELINE = "penstock.pipeline"
STEP = "penstock.step"
UPSTREAM = "penstock.upstream"
RETRY_AFTER_SECONDS = "penstock.retry_after_seconds"
UPSTREAM_REQUEST_ID = "penstock.upstream_request_id"
GATE_NAME = "penstock.gate.name"
LIMIT_NAME = "penstock.limit.name"
LIMIT_BEFORE = "penstock.limit.before"
LIMIT_AFTER = "penstock.limit.after"
LIMIT_CAUSE = "penstock.limit.cause"
GATE_LIMIT = "penstock.gate.limit"
GATE_IN_USE = "penstock.gate.in_use"
GATE_QUEUE_DEPTH = "penstock.gate.queue_depth"
GATE_PRIORITY = "penstock.gate.priority"
GATE_RESULT = "penstock.gate.result"
BACKOFF_SECONDS = "penstock.backoff.seconds"
BACKOFF_SOURCE = "penstock.backoff.source"
BACKOFF_REASON = "penstock.backoff.reason"
CONTENT_ASKED = "penstock.content.request"
CONTENT_ANSWERED = "penstock.content.response"
STREAM_CHUNKS = "penstock.stream.chunks"
STREAM_BYTES = "penstock.stream.bytes"
STREAM_MAX_GAP_SECONDS = "penstock.stream.max_gap_seconds"
STREAM_END_REASON = "penstock.stream.end_reason"
STREAM_PINGS = "penstock.stream.pings"
STALL_SECONDS = "penstock.stall_seconds"

EVENT_FIRST_CHUNK = "gen_ai.first_chunk"
EVENT_STALLED = "stream.stalled"
EVENT_CLIENT_LEFT = "client.disconnected"
EVENT_LIMIT_CHANGED = "limit.changed"
CLIENT_LEFT = "client_disconnected"  # the root's error.type
