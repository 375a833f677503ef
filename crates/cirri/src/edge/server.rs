//! The load balancer's end of its socket.

use std::io;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::api::{Drain, Drained, Pools};
use super::{Shared, report};
use crate::api::{Answer, ApiError, Request};
use crate::listener::{self, ServerSocket};

/// The longest question.
const LONGEST: u64 = 1 << 20;

/// Answers until the process stops.
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
    let question = listener::question(&mut BufReader::new(reader), LONGEST).await?;
    let answer = match question {
        _ if !may_ask => Err(ApiError::new("denied", "only the load balancer's user and root may ask")),
        Ok(request) => answer(shared, request).await,
        Err(error) => Err(error),
    };
    let answer = match answer {
        Ok(value) => Answer::Result(value),
        Err(error) => Answer::Error(error),
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    writer.write_all(&text).await
}

async fn answer(shared: &Arc<Shared>, Request { method, params }: Request) -> Result<serde_json::Value, ApiError> {
    match method.as_str() {
        "status" => json(&report::status(shared).await?),
        "list" => json(&report::list(&*shared.core.lock().await)?),
        "stats" => json(&report::stats(&*shared.core.lock().await)?),
        "pools" => {
            let Pools { names } = read(params)?;
            json(&report::pools(shared, &names).await?)
        }
        "drain" => json(&drain(shared, &read::<Drain>(params)?.backend, true).await?),
        "undrain" => json(&drain(shared, &read::<Drain>(params)?.backend, false).await?),
        other => Err(ApiError::new("bad-request", format!("there is no method `{other}`"))
            .hint("load balancer and command must be of the same version")),
    }
}

async fn drain(shared: &Shared, name: &str, drained: bool) -> Result<Drained, ApiError> {
    let mut core = shared.core.lock().await;
    let fits = core.set_drained(name, drained).map_err(|error| ApiError::new("internal", error))?;
    if fits.is_empty() {
        return Err(ApiError::new("not-found", format!("there is no backend {name}"))
            .hint("`cirri lb list` shows them; name one by NAME, SERVICE/NAME, address, or address and port"));
    }
    for target in &fits {
        tracing::info!(service = target.service, backend = target.backend, drained, "drained by hand");
    }
    Ok(Drained { backends: fits.iter().map(|target| format!("{}/{}", target.service, target.backend)).collect() })
}

fn read<T: DeserializeOwned>(params: serde_json::Value) -> Result<T, ApiError> {
    let params = if params.is_null() { serde_json::json!({}) } else { params };
    serde_json::from_value(params).map_err(|error| ApiError::new("bad-request", format!("params: {error}")))
}

fn json(value: &impl Serialize) -> Result<serde_json::Value, ApiError> {
    serde_json::to_value(value).map_err(|error| ApiError::new("internal", error))
}
