// Create a build, start it, and follow its log until it ends: node docs/api/example.js
// BUILDMILL, EMAIL, PASSWORD and PROJECT_ID say where and who. Needs Node 18 or newer and the package `ws`.

const WebSocket = require('ws');

const address = process.env.BUILDMILL || 'http://127.0.0.1:3000';
const api = `${address}/api/v1`;

async function ask(method, path, headers, body) {
  const response = await fetch(api + path, {
    method,
    headers: { ...headers, ...(body && { 'Content-Type': 'application/json' }) },
    body: body && JSON.stringify(body)
  });
  const said = await response.json();
  if (!response.ok) throw new Error(`${response.status}: ${said.error}`);
  return said;
}

function follow(buildId, headers) {
  return new Promise((resolve, reject) => {
    const url = `${api.replace(/^http/, 'ws')}/builds/${buildId}/logs/stream`;
    const ws = new WebSocket(url, [], { headers });
    ws.onmessage = (event) => {
      const log = JSON.parse(event.data);
      console.log(`[${log.level}] ${log.metadata.step}: ${log.message}`);
    };
    ws.onerror = reject;
    ws.onclose = (event) => (event.code === 1000 ? resolve() : reject(new Error(`closed with ${event.code}`)));
  });
}

async function main() {
  const login = await ask('POST', '/auth/login', {}, {
    email: process.env.EMAIL,
    password: process.env.PASSWORD
  });
  const headers = { Authorization: `Bearer ${login.token}`, 'X-Tenant-ID': login.tenants[0].id };
  const build = await ask('POST', '/builds', headers, {
    project_id: process.env.PROJECT_ID,
    git_branch: 'main'
  });
  console.log(`Created build ${build.id}`);
  await ask('POST', `/builds/${build.id}/start`, headers);
  await follow(build.id, headers);
  const status = await ask('GET', `/builds/${build.id}/status`, headers);
  console.log(`Status: ${status.status}`);
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
