//! The agent's end of its socket.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::{Shared, attach, check, dump, services, wait};
use crate::api::{
    Answer, ApiError, BackendInfo, EndpointAdd, EndpointDelete, EndpointGet, MapDump, Observe, PolicyExplain,
    PolicyGet, Removed, ServiceGet, ServiceInfo, Wait,
};
use crate::listener::{self, ServerSocket};

/// The longest question. GC names every container of a node.
const LONGEST: u64 = 16 << 20;
/// Records per write of a stream.
const BATCH: usize = 512;

/// Answers until the agent stops.
pub async fn serve(shared: Arc<Shared>, server_socket: Arc<ServerSocket>) {
    listener::serve(server_socket, |stream| {
        let shared = Arc::clone(&shared);
        async move { converse(&shared, stream).await }
    })
    .await;
}

async fn converse(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    let may_ask = listener::may_ask(&stream)?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let question = listener::question(&mut reader, LONGEST).await?;
    if !may_ask {
        return refuse(&mut writer, ApiError::new("denied", "only the agent's user and root may ask")).await;
    }
    let request = match question {
        Ok(request) => request,
        Err(error) => return refuse(&mut writer, error).await,
    };
    let mut client = Client { writer, params: request.params };
    // A client that hangs up ends a stream that has nothing to say.
    let mut rest = [0; 1];
    tokio::select! {
        outcome = answer(shared, &request.method, &mut client) => match outcome? {
            Ok(()) => Ok(()),
            Err(error) => refuse(&mut client.writer, error).await,
        },
        _ = reader.read(&mut rest), if streams(&request.method) => Ok(()),
    }
}

fn streams(method: &str) -> bool {
    matches!(method, "observe" | "monitor")
}

struct Client {
    writer: tokio::net::unix::OwnedWriteHalf,
    params: serde_json::Value,
}

impl Client {
    fn params<T: DeserializeOwned>(&mut self) -> Result<T, ApiError> {
        let params = match std::mem::take(&mut self.params) {
            serde_json::Value::Null => serde_json::json!({}),
            params => params,
        };
        serde_json::from_value(params).map_err(|error| ApiError::new("bad-request", format!("params: {error}")))
    }

    async fn send(&mut self, values: impl IntoIterator<Item = impl Serialize>) -> io::Result<()> {
        let mut text = Vec::new();
        for value in values {
            let value = serde_json::to_value(value).map_err(io::Error::other)?;
            serde_json::to_writer(&mut text, &Answer::Result(value))?;
            text.push(b'\n');
        }
        self.writer.write_all(&text).await
    }
}

async fn refuse(writer: &mut tokio::net::unix::OwnedWriteHalf, error: ApiError) -> io::Result<()> {
    let mut text = serde_json::to_vec(&Answer::Error(error))?;
    text.push(b'\n');
    writer.write_all(&text).await
}

/// The outer error: the client went away. The inner: what it is told.
async fn answer(shared: &Arc<Shared>, method: &str, client: &mut Client) -> io::Result<Result<(), ApiError>> {
    match method {
        "observe" => return observe(shared, client).await,
        "monitor" => return monitor(shared, client).await,
        _ => {}
    }
    match once(shared, method, client).await {
        Ok(value) => client.send([value]).await.map(Ok),
        Err(error) => Ok(Err(error)),
    }
}

async fn once(shared: &Arc<Shared>, method: &str, client: &mut Client) -> Result<serde_json::Value, ApiError> {
    match method {
        "status" => json(&shared.status().await?),
        "config.get" => json(&shared.config_values),
        "endpoint.list" => {
            let core = shared.core.lock().await;
            json(&core.endpoints.values().map(|endpoint| core.endpoint_info(endpoint)).collect::<Vec<_>>())
        }
        "endpoint.get" => {
            let EndpointGet { id } = client.params()?;
            endpoint(shared, id).await
        }
        "endpoint.add" => {
            let asked: EndpointAdd = client.params()?;
            json(&attach::add(shared, &asked, || listener::is_there(client.writer.as_ref())).await?)
        }
        "endpoint.delete" => {
            let removed = attach::delete(shared, &client.params::<EndpointDelete>()?).await?;
            json(&Removed { removed: usize::from(removed) })
        }
        "endpoint.check" => json(&check::check(shared, &client.params()?).await?),
        "endpoint.ready" => json(&shared.readiness().await),
        "endpoint.gc" => json(&Removed { removed: attach::collect(shared, &client.params()?).await? }),
        "identity.list" => json(&shared.core.lock().await.identity_infos()),
        "policy.get" => json(&shared.core.lock().await.policy_infos(&client.params::<PolicyGet>()?)),
        "policy.explain" => json(&shared.core.lock().await.explain(&client.params::<PolicyExplain>()?)?),
        "service.list" => json(&shared.core.lock().await.serving.detailed(&client.params::<ServiceGet>()?)),
        "service.get" => json(&service(shared, &client.params()?).await?),
        "service.backends" => json(&backends(shared, &client.params()?).await?),
        "map.list" => json(&shared.core.lock().await.map_infos()?),
        "map.dump" => {
            let MapDump { name, limit } = client.params()?;
            let tables = shared.core.lock().await.tables.clone();
            json(&dump::dump(&tables, &name, limit)?)
        }
        "wait" => json(&wait::wait(shared, &client.params::<Wait>()?).await?),
        other => Err(ApiError::new("bad-request", format!("there is no method `{other}`"))
            .hint("agent and command must be of the same version")),
    }
}

async fn endpoint(shared: &Arc<Shared>, id: u16) -> Result<serde_json::Value, ApiError> {
    let core = shared.core.lock().await;
    let endpoint = core.endpoints.get(&id).ok_or_else(|| {
        ApiError::new("not-found", format!("there is no endpoint {id}")).hint("see `cirri endpoint list`")
    })?;
    json(&core.endpoint_info(endpoint))
}

async fn service(shared: &Arc<Shared>, wanted: &ServiceGet) -> Result<Vec<ServiceInfo>, ApiError> {
    let mut all = shared.core.lock().await.serving.detailed(wanted);
    let mut backends = backends(shared, wanted).await?;
    for info in &mut all {
        let of = format!("{}/{}:{}/{}", info.namespace, info.name, info.port, info.protocol);
        let own = |backend: &BackendInfo| backend.service == of && backend.ip.is_ipv6() == (info.ip_version == 6);
        let (mine, rest) = backends.into_iter().partition(own);
        (info.backends, backends) = (mine, rest);
    }
    Ok(all)
}

/// Counters are read without the lock: there may be many.
async fn backends(shared: &Arc<Shared>, wanted: &ServiceGet) -> Result<Vec<BackendInfo>, ApiError> {
    let (tables, mut backends) = {
        let core = shared.core.lock().await;
        (core.tables.clone(), core.serving.backend_infos(wanted))
    };
    services::count(&tables, &mut backends).map_err(|error| ApiError::new("internal", error))?;
    Ok(backends)
}

async fn observe(shared: &Arc<Shared>, client: &mut Client) -> io::Result<Result<(), ApiError>> {
    let asked: Observe = match client.params() {
        Ok(asked) => asked,
        Err(error) => return Ok(Err(error)),
    };
    if let Err(error) = asked.filter.check() {
        return Ok(Err(ApiError::new("bad-request", error)));
    }
    let ring = &shared.ring;
    let end = ring.end();
    let mut next = end;
    if asked.last.is_some() || !asked.follow {
        let kept = ring.read(0, usize::MAX);
        next = kept.next;
        let mut matching: Vec<_> = kept.records.into_iter().filter(|record| asked.filter.matches(record)).collect();
        let skip = asked.last.map_or(0, |last| matching.len().saturating_sub(last));
        for batch in matching.split_off(skip).chunks(BATCH) {
            client.send(batch.iter().map(|record| &**record)).await?;
        }
    }
    if !asked.follow {
        return Ok(Ok(()));
    }
    loop {
        let batch = ring.follow(next, BATCH).await;
        if batch.lost > 0 {
            let lost = shared.decoder.lost("reader", batch.lost, super::flows::monotonic_ns());
            client.send([lost]).await?;
        }
        next = batch.next;
        client.send(batch.records.iter().filter(|record| asked.filter.matches(record)).map(|record| &**record)).await?;
    }
}

async fn monitor(shared: &Arc<Shared>, client: &mut Client) -> io::Result<Result<(), ApiError>> {
    let mut events = shared.events.subscribe();
    loop {
        match events.recv().await {
            Ok(event) => client.send([super::flows::event_json(&event)]).await?,
            Err(tokio::sync::broadcast::error::RecvError::Lagged(lost)) => {
                client.send([serde_json::json!({ "lost": lost })]).await?;
            }
            Err(tokio::sync::broadcast::error::RecvError::Closed) => return Ok(Ok(())),
        }
    }
}

fn json(value: &impl Serialize) -> Result<serde_json::Value, ApiError> {
    serde_json::to_value(value).map_err(|error| ApiError::new("internal", error))
}

/// How long something took, whole milliseconds.
pub fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis().try_into().unwrap_or(u64::MAX)
}
