// One answer while it comes: fills a node of the tree and keeps its figures.
// `stats` ends as: first (s to the first token), thought (s), thinking, out, in, cached (tokens), rate (tokens/s), cost.
// Until the server has sent its usage, tokens are counted by the pieces they come in: `exact` says which it is.

import { ApiError } from "./api.js";

export class Generation {
  constructor(api, node, body, changed) {
    Object.assign(this, { api, node, body, changed });
    this.abort = new AbortController();
    this.started = this.firstAt = this.lastAt = this.thoughtTo = null;
  }

  stop() {
    this.abort.abort();
  }

  async run() {
    const { node } = this;
    Object.assign(node, { state: "waiting", content: "", reasoning: "", error: null, finish: "", queue: null });
    node.stats = { thinking: 0, out: 0, exact: 0 };
    this.started = performance.now();
    const clock = setInterval(() => this.tick(), 250);
    try {
      for await (const { comment, chunk } of this.api.complete(this.body, this.abort.signal)) {
        if (chunk) this.take(chunk);
        else this.listen(comment);
        this.changed();
      }
      node.state = "done";
    } catch (e) {
      node.state = e.name === "AbortError" || this.abort.signal.aborted ? "stopped" : "error";
      if (node.state === "error") node.error = (e instanceof ApiError ? e : new ApiError({ message: String(e) })).record;
    } finally {
      clearInterval(clock);
      node.queue = null;
      this.changed();
    }
  }

  listen(comment) {
    const place = /queued\D*(\d+)/.exec(comment);
    if (place) this.node.queue = Number(place[1]);
  }

  take(chunk) {
    const { node } = this;
    const { delta = {}, finish_reason } = chunk.choices?.[0] ?? {};
    if (delta.reasoning_content || delta.content) this.count(Boolean(delta.content));
    node.reasoning += delta.reasoning_content ?? "";
    node.content += delta.content ?? "";
    if (finish_reason) node.finish = finish_reason;
    if (chunk.model) node.model = chunk.model;
    if (chunk.usage) this.account(chunk.usage);
  }

  count(answering) {
    const { node } = this;
    const now = performance.now();
    this.firstAt ??= now;
    this.lastAt = now;
    node.queue = null;
    node.state = answering ? "answering" : "thinking";
    node.stats.first = (this.firstAt - this.started) / 1000;
    node.stats.out += 1;
    if (!answering) node.stats.thinking += 1;
    else if (node.reasoning) this.thoughtTo ??= now;
    this.tick();
  }

  tick() {
    const { node } = this;
    const now = performance.now();
    if (node.reasoning) node.stats.thought = Math.max(0.01, ((this.thoughtTo ?? now) - this.firstAt) / 1000);
    if (this.firstAt) this.rate(now);
    this.changed();
  }

  account(usage) {
    const { stats } = this.node;
    const details = usage.completion_tokens_details ?? {};
    stats.in = usage.prompt_tokens;
    stats.cached = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
    stats.out = usage.completion_tokens;
    stats.thinking = details.reasoning_tokens ?? 0;
    if (usage.cost_usd > 0) stats.cost = usage.cost_usd; // nothing where no prices are set
    stats.exact = 1;
    if (this.firstAt) this.rate(this.lastAt);
  }

  // Tokens after the first, over the time they took; nothing where that is too short to tell.
  rate(until) {
    const { stats } = this.node;
    if (until - this.firstAt > 100) stats.rate = ((stats.out - 1) / (until - this.firstAt)) * 1000;
    else delete stats.rate;
  }
}
