"use strict";

// Everything that is shown goes through textContent: neither the specification nor an answer can bring markup.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const LONGEST_SHOWN = 200000;
const PATIENCE_MS = 30000;
const byId = (id) => document.getElementById(id);
let specification;

function resolved(schema) {
  for (let depth = 0; schema && schema.$ref && depth < 20; depth += 1) {
    const place = schema.$ref.replace("#/", "").split("/");
    schema = place.reduce((value, key) => value && value[key], specification);
  }
  return schema || {};
}

function chosen(schema) {
  const found = resolved(schema);
  if (!found.anyOf) return found;
  return resolved(found.anyOf.find((branch) => branch.type !== "null") || {});
}

function example(schema, name = "", depth = 0) {
  const found = chosen(schema);
  if (found.examples) return found.examples[0];
  if (found.enum) return found.enum[0];
  if (found.type === "object") {
    const shown = {};
    if (depth > 6) return shown;
    for (const [field, inner] of Object.entries(found.properties || {})) {
      if ((found.required || []).includes(field)) shown[field] = example(inner, field, depth + 1);
    }
    return shown;
  }
  if (found.type === "array") {
    const item = chosen(found.items);
    return item.type === "object" && depth < 6 ? [example(item, name, depth + 1)] : [];
  }
  if (found.type === "integer" || found.type === "number") return found.default ?? found.minimum ?? 0;
  if (found.type === "boolean") return found.default ?? false;
  const known = { accountId: "acme", imageSlug: "base", runScript: "echo hello\n", slug: "base", name: "example" };
  return known[name] ?? "";
}

function kind(schema) {
  const found = chosen(schema);
  const parts = [found.enum ? found.enum.join(" | ") : found.format || found.type || "any"];
  if (found.minimum !== undefined || found.maximum !== undefined) parts.push(`${found.minimum ?? ""} to ${found.maximum ?? ""}`);
  if (found.default !== undefined) parts.push(`${JSON.stringify(found.default)} by default`);
  return parts.join(", ");
}

function parameterRow(parameter, fields) {
  const choices = chosen(parameter.schema).type === "boolean" ? ["true", "false"] : chosen(parameter.schema).enum;
  const input = choices
    ? make("select", {}, make("option", { value: "", textContent: "" }), ...choices.map((value) => make("option", { textContent: value })))
    : make("input", { type: "text", autocomplete: "off", spellcheck: false });
  input.setAttribute("aria-label", parameter.name);
  fields.push({ parameter, input });
  return make("tr", {},
    make("td", {}, make("code", { className: parameter.required ? "must" : "", textContent: parameter.name }), " ",
      make("span", { className: "soft", textContent: parameter.in })),
    make("td", { className: "field" }, input),
    make("td", {}, parameter.description || "", make("div", { className: "soft", textContent: kind(parameter.schema) })));
}

function bodyPart(operation) {
  if (!operation.requestBody) return null;
  const [mediaType, content] = Object.entries(operation.requestBody.content)[0];
  const isJson = mediaType === "application/json";
  const text = make("textarea", { spellcheck: false, value: isJson ? JSON.stringify(example(content.schema), null, 2) : "" });
  text.rows = Math.min(24, text.value.split("\n").length + 1);
  text.setAttribute("aria-label", "Body");
  const optional = isJson ? Object.entries(resolved(content.schema).properties || {})
    .filter(([field]) => !(resolved(content.schema).required || []).includes(field)).map(([field]) => field) : [];
  const shown = make("div", {}, make("div", { className: "label", textContent: `Body, ${mediaType}` }), text);
  if (optional.length) shown.append(make("div", { className: "soft", textContent: `also possible: ${optional.join(", ")}` }));
  return { mediaType, text, shown };
}

function request(method, path, fields, body) {
  const headers = {};
  const query = new URLSearchParams();
  for (const { parameter, input } of fields) {
    const value = input.value;
    if (parameter.in === "path") path = path.replace(`{${parameter.name}}`, encodeURIComponent(value));
    else if (value !== "" && parameter.in === "query") query.append(parameter.name, value);
    else if (value !== "" && parameter.in === "header") headers[parameter.name] = value;
  }
  const token = byId("token").value.trim();
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = body.mediaType;
  const address = path + (query.size ? `?${query}` : "");
  const options = { method: method.toUpperCase(), headers, cache: "no-store", redirect: "error", signal: AbortSignal.timeout(PATIENCE_MS) };
  if (body) options.body = body.text.value;
  return { address, options };
}

async function readSome(response) {
  const reader = response.body && response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  while (reader && text.length < LONGEST_SHOWN) {
    const { done, value } = await reader.read();
    if (done) return text + decoder.decode();
    text += decoder.decode(value, { stream: true });
  }
  if (reader) await reader.cancel();
  return reader ? `${text}\n… (the rest is not shown)` : text;
}

function pretty(text, type) {
  if (!type.includes("json")) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

async function send(prepared, answer, button) {
  button.disabled = true;
  answer.hidden = false;
  answer.className = "answer";
  answer.replaceChildren(make("span", { className: "soft", textContent: "waiting…" }));
  const began = performance.now();
  try {
    const response = await fetch(prepared.address, prepared.options);
    const type = response.headers.get("content-type") || "";
    const text = pretty(await readSome(response), type);
    answer.classList.add(response.ok ? "good" : "bad");
    answer.replaceChildren(
      make("strong", { textContent: `${response.status} ${response.statusText}` }),
      make("span", { className: "soft", textContent: `  ${Math.round(performance.now() - began)} ms  ${type}` }),
      make("div", { className: "label", textContent: `${prepared.options.method} ${prepared.address}` }));
    if (text) answer.append(make("pre", { textContent: text }));
  } catch (error) {
    answer.classList.add("bad");
    answer.replaceChildren(make("strong", { textContent: "No answer" }), make("pre", { textContent: String(error) }));
  }
  button.disabled = false;
}

function fill(card, method, path, operation) {
  const inside = make("div", { className: "inside" });
  const fields = [];
  if (operation.description) inside.append(make("p", { textContent: operation.description }));
  if (operation.parameters) {
    const head = make("tr", {}, make("th", { textContent: "Parameter" }), make("th", { textContent: "Value" }), make("th", { textContent: "Meaning" }));
    inside.append(make("table", {}, head, ...operation.parameters.map((parameter) => parameterRow(parameter, fields))));
  }
  const body = bodyPart(operation);
  if (body) inside.append(body.shown);
  const statuses = Object.entries(operation.responses).map(([status, { description }]) => `${status} ${description}`);
  const button = make("button", { type: "button", textContent: "Send" });
  const answer = make("div", { hidden: true });
  answer.setAttribute("aria-live", "polite");
  button.addEventListener("click", () => send(request(method, path, fields, body), answer, button));
  inside.append(button, answer, make("div", { className: "soft", textContent: `Answers: ${statuses.join(" · ")}` }));
  card.append(inside);
}

function operationCard(method, path, operation) {
  const card = make("details", { className: "operation", id: operation.operationId });
  card.append(make("summary", {},
    make("span", { className: `verb ${method}`, textContent: method.toUpperCase() }),
    make("span", { className: "path", textContent: path }),
    make("span", { className: "said", textContent: operation.summary })));
  card.addEventListener("toggle", () => {
    if (card.open && card.childElementCount === 1) fill(card, method, path, operation);
  });
  return card;
}

function openNamed() {
  const card = byId(decodeURIComponent(location.hash.slice(1)));
  if (card instanceof HTMLDetailsElement) {
    card.open = true;
    card.scrollIntoView();
  }
}

function show() {
  const { title, version, description } = specification.info;
  byId("title").replaceChildren(title, make("small", { textContent: version }));
  byId("about").textContent = description;
  byId("wait").remove();
  const all = Object.entries(specification.paths)
    .flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => ({ path, method, operation })));
  const nav = document.querySelector("nav");
  const entries = [];
  for (const tag of specification.tags) {
    const mine = all.filter(({ operation }) => operation.tags.includes(tag.name));
    byId("operations").append(make("h2", {}, tag.name, make("small", { textContent: tag.description })));
    nav.append(make("h2", { textContent: tag.name }));
    for (const { path, method, operation } of mine) {
      const card = operationCard(method, path, operation);
      const link = make("a", { href: `#${operation.operationId}` },
        make("span", { className: `verb ${method}`, textContent: method.toUpperCase() }), make("span", { textContent: path }));
      link.addEventListener("click", () => { card.open = true; });
      byId("operations").append(card);
      nav.append(link);
      entries.push({ card, link, words: `${method} ${path} ${operation.summary}`.toLowerCase() });
    }
  }
  byId("filter").addEventListener("input", () => {
    const wanted = byId("filter").value.trim().toLowerCase();
    for (const { card, link, words } of entries) card.hidden = link.hidden = !words.includes(wanted);
  });
  openNamed();
}

async function start() {
  try {
    const response = await fetch("/openapi.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!response.ok) throw new Error(`the specification was answered with ${response.status}`);
    specification = await response.json();
    show();
  } catch (error) {
    byId("operations").replaceChildren(make("p", { textContent: `The specification cannot be shown: ${error}` }));
  }
}

start();
