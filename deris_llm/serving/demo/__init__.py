"""The demo in the browser (`deris-llm demo`): pure functions that draw, a service that runs the models, a page of gradio."""
