"""The trainer's parts: what surrounds one optimizer step."""
