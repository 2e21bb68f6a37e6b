"""A server for clients of OpenAI's API: HTTP in, a batch of texts behind it."""
