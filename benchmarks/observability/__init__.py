"""What it costs to know: CPU of the gateway per request, with everything on and with everything off."""
