"""An HTTP server with OpenAI's interface: one base in four bits, many adapters at once."""
