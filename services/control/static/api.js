// Requests to the run. The token comes from the address (#token=...), this tab's memory, or the person, who is asked once.

function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  sessionStorage.setItem("token", token);
  history.replaceState(null, "", location.pathname + location.search);
}
takeToken();
addEventListener("hashchange", takeToken);

export class Problem extends Error {
  constructor(status, document) {
    super(document.detail ?? `the service answered ${status}`);
    this.status = status;
    this.errors = document.errors ?? [];
  }
}

let asking = null;

function askToken(refused) {
  document.getElementById("token-refused").hidden = !refused;
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("token-dialog");
    const input = document.getElementById("token-input");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("token", input.value.trim());
      input.value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// Answers { body, etag }. Throws Problem when the service refuses, TypeError when it cannot be reached.
export async function request(path, { method = "GET", headers = {}, body } = {}) {
  for (;;) {
    const token = sessionStorage.getItem("token");
    const given = token ? { authorization: `Bearer ${token}` } : {};
    const answer = await fetch(path, { method, body, cache: "no-store", headers: { ...headers, ...given } });
    if (answer.status === 401) {
      await askToken(Boolean(token));
      continue;
    }
    const document = await answer.json();
    if (!answer.ok) throw new Problem(answer.status, document);
    return { body: document, etag: answer.headers.get("etag") };
  }
}

export async function get(path) {
  return (await request(path)).body;
}
