// llama.cpp on one GGUF file: node run.mjs job.json result.json, where the job is
//   {model, lora, tokenize: [text], render: [messages], generate: [{tokens, max}], score: [tokens]}
// Generating is greedy and ends where llama.cpp says that an answer ends; a score is the mean
// negative log-likelihood of all tokens but the first.
import {readFileSync, writeFileSync} from "node:fs";
import {Template} from "@huggingface/jinja";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const job = JSON.parse(readFileSync(process.argv[2], "utf-8"));
const llama = await getLlama({
    build: "never", gpu: false, maxThreads: 1, logLevel: LlamaLogLevel.error, progressLogs: false
});
const model = await llama.loadModel({modelPath: job.model, gpuLayers: 0});
const tokenizer = model.fileInfo.metadata.tokenizer;
const context = await model.createContext({
    contextSize: 1024, sequences: 1, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    ...(job.lora ? {lora: {adapters: [{filePath: job.lora, scale: 1}]}} : {})
});
const sequence = context.getSequence();

function render(messages) {
    const {tokens, bos_token_id: bos, eos_token_id: eos} = tokenizer.ggml;
    return new Template(tokenizer.chat_template).render({
        messages, add_generation_prompt: true,
        bos_token: tokens[bos] ?? "", eos_token: tokens[eos] ?? ""
    });
}

async function generate({tokens, max}) {
    const found = [];
    let ended = false;
    await sequence.clearHistory();
    const evaluation = sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true});
    for await (const token of evaluation) {
        found.push(token);
        ended = model.isEogToken(token);
        if (ended || found.length === max)
            break;
    }
    return {tokens: found, ended};
}

async function score(tokens) {
    await sequence.clearHistory();
    const results = await sequence.controlledEvaluate(tokens.map((token, i) => (
        i + 1 === tokens.length ? token : [token, {generateNext: {
            probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}
        }}]
    )));
    let total = 0;
    for (let i = 0; i + 1 < tokens.length; i++)
        total -= Math.log(results[i].next.probabilities.get(tokens[i + 1]));
    return total / (tokens.length - 1);
}

const result = {tokenize: [], render: [], generate: [], score: []};
for (const text of job.tokenize ?? [])
    result.tokenize.push(model.tokenize(text, true));
for (const messages of job.render ?? [])
    result.render.push(render(messages));
for (const prompt of job.generate ?? [])
    result.generate.push(await generate(prompt));
for (const tokens of job.score ?? [])
    result.score.push(await score(tokens));
writeFileSync(process.argv[3], JSON.stringify(result));
process.exit(0);
