"""L1: what attention means. numpy only; nothing here knows a framework or a kernel."""
