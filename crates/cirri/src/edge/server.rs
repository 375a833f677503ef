//! The load balancer's end of its socket.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::api::{Drain, Drained, Pools};
use super::{Shared, report};
use crate::api::{Answer, ApiError, Request};

/// The longest question.
const LONGEST: u64 = 1 << 20;

/// Listens; replaces the socket that an earlier run left.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    crate::files::remove(path)?;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers until the process stops.
pub async fn serve(shared: Arc<Shared>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = Arc::clone(&shared);
                tokio::task::spawn_local(async move {
                    if let Err(error) = converse(&shared, stream).await {
                        tracing::debug!(%error, "a client went away");
                    }
                });
            }
            Err(error) => {
                // Too many open files, most likely; clients retry, and others will close theirs.
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    // The mode of the socket says it already, but there is a moment before it is set.
    let peer = stream.peer_cred()?.uid();
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(LONGEST)).read_line(&mut line).await?;
    let answer = if peer != 0 && peer != rustix::process::geteuid().as_raw() {
        Err(ApiError::new("denied", "only the load balancer's user and root may ask"))
    } else {
        answer(shared, &line).await
    };
    let answer = match answer {
        Ok(value) => Answer::Result(value),
        Err(error) => Answer::Error(error),
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    writer.write_all(&text).await
}

async fn answer(shared: &Arc<Shared>, line: &str) -> Result<serde_json::Value, ApiError> {
    let Request { method, params } = serde_json::from_str(line)
        .map_err(|error| ApiError::new("bad-request", format!("the question cannot be read: {error}")))?;
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
