"""The audit of requests to forget: samples to score (`sets`), relearning on copies (`sandbox`), `audit` over both."""
