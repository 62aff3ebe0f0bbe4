"""SGLang servers: how they are started, spoken to, and watched."""
