RECORD: dict[str, str | None]
