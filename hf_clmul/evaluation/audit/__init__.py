"""The audit: attacks that try to bring back what a model has unlearned. It knows models and data that it is handed; nothing of
requests, training runs or reports."""
