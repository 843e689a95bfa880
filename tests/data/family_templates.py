"""Chat templates after each family's published format, in our own words.

With and without a system role, with text behind the end of turn, with spaces before the response,
with thoughts, tools and a date; and two kinds without control tokens around the turns.
"""

LLAMA2 = """
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- bos_token ~ '[INST] ' ~ (system if loop.first else '') }}
        {{- turn.content.strip() ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ turn.content.strip() ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' ~ strftime_now('%d %b %Y') ~ '\\n\\n' }}
{%- for tool in tools or [] %}{{- tool | tojson ~ '\\n\\n' }}{%- endfor %}
{{- system ~ '<|eot_id|>' }}
{%- for turn in turns %}
    {%- if turn.tool_calls %}
        {%- set call = turn.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' ~ call.name ~ '", ' }}
        {{- '"parameters": ' ~ call.arguments | tojson ~ '}' }}
        {{- '<|eom_id|>' if call.name == 'python' else '<|eot_id|>' }}
    {%- else %}
        {%- set role = 'ipython' if turn.role == 'tool' else turn.role %}
        {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
        {{- turn.content | trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Version 3 with SentencePiece writes spaces around the control tokens, the Tekken one none.
MISTRAL = """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content ~ '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- set last = (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}
        {%- if turn is sameas last and tools %}
            {{- '[AVAILABLE_TOOLS]SPACE' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]SPACE' ~ (system if turn is sameas last else '') ~ turn.content ~ '[/INST]' }}
    {%- elif turn.role == 'tool' %}
        {{- '[TOOL_RESULTS]SPACE{"content": ' ~ turn.content ~ '}[/TOOL_RESULTS]' }}
    {%- elif turn.tool_calls %}
        {{- '[TOOL_CALLS]SPACE' ~ turn.tool_calls | map(attribute='function') | list | tojson }}
        {{- eos_token }}
    {%- elif turn.role == 'assistant' %}
        {{- 'SPACE' ~ turn.content ~ eos_token }}
    {%- else %}
        {{- raise_exception('only user, assistant and tool roles follow the system message') }}
    {%- endif %}
{%- endfor %}"""

QWEN25 = """
{%- set given = messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' }}
{{- messages[0].content if given else 'You are Qwen, created by Alibaba Cloud.' }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' ~ tool | tojson }}{%- endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for turn in (messages[1:] if given else messages) %}
    {%- if turn.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if turn.content %}{{- '\\n' ~ turn.content }}{%- endif %}
        {%- for call in turn.tool_calls %}
            {{- '\\n<tool_call>\\n' ~ call.function | tojson ~ '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif turn.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' ~ turn.content ~ '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Earlier turns lose their thoughts; the last one has a think block even if it is empty.
QWEN3 = """
{%- set found = namespace(last_query=-1) %}
{%- for turn in messages %}
    {%- if turn.role == 'user' %}{%- set found.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for turn in messages %}
    {%- if turn.role == 'assistant' %}
        {%- set content = turn.content %}
        {%- set thoughts = turn.reasoning_content or '' %}
        {%- if '</think>' in content and not thoughts %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > found.last_query and (loop.last or thoughts) %}
            {{- '<think>\\n' ~ thoughts.strip('\\n') ~ '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

GEMMA = """
{{- bos_token }}
{%- for turn in messages %}
    {%- if turn.role == 'system' %}{{- raise_exception('system role not supported') }}{%- endif %}
    {%- set role = 'model' if turn.role == 'assistant' else turn.role %}
    {{- '<start_of_turn>' ~ role ~ '\\n' ~ turn.content | trim ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# Its control tokens swallow the white space behind them; a conversation ends with EOS as well.
PHI3 = """
{%- for turn in messages %}
    {{- '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ '<|end|>\\n' }}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""

PHI4 = """
{%- for turn in messages %}
    {{- '<|im_start|>' ~ turn.role ~ '<|im_sep|>' ~ turn.content ~ '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""

# The prompt ends in a space, which most tokenizers join to the answer's first word.
VICUNA = """
{%- for turn in messages %}
    {%- if turn.role == 'user' %}{{- 'USER: ' ~ turn.content ~ ' ASSISTANT: ' }}
    {%- else %}{{- turn.content ~ eos_token }}{%- endif %}
{%- endfor %}"""

# No special token ends a turn; the headings are ordinary text.
ALPACA = """
{%- for turn in messages %}
    {{- '### ' ~ ('Instruction' if turn.role == 'user' else 'Response') ~ ':\\n' }}
    {{- turn.content ~ '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"""
