"""Chat templates with the habits of published families, for tests of loss masks."""

# Habits of Qwen2.5: a system prompt of its own where there is none; results of tools in a row share a turn.
_TOOLS_TURN = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}"
    "{{ 'tools:' }}{% for tool in tools %}{{ ' ' + tool.function.name }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
)
_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '\\n' if body or not loop.first }}"
    "{{ '<tool_call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
)
_RESULTS = (
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}"
    "{{ '\\n<tool_response>' + m.content + '</tool_response>' }}"
    "{{ '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}"
)
_TALK = "{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"

QWEN = (
    _TOOLS_TURN + "{% else %}{{ '<|im_start|>system\\nbe helpful<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}" + _TALK + "{% elif m.role == 'assistant' %}{% set body = m.content or '' %}"
    "{{ '<|im_start|>assistant\\n' + body }}" + _CALLS + "{{ '<|im_end|>\\n' }}" + _RESULTS + "{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
)

# Habits of Qwen3: thoughts stay in answers behind the last question only, where the last answer has some always.
QWEN3 = (
    _TOOLS_TURN + "{% endif %}{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}" + _TALK + "{% elif m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set body = m.content or '' %}"
    "{% if not thought and '</think>' in body %}"
    "{% set thought = body.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set body = body.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ body }}" + _CALLS + "{{ '<|im_end|>\\n' }}" + _RESULTS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)

# Habits of the distilled R1: answers lose their thoughts, and the generation prompt opens one.
R1 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '[U]' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '[A]' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
    "{{ '[A]<think>\\n' if add_generation_prompt }}"
)
