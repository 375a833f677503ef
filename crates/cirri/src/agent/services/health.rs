//! `healthCheckNodePort`: load balancers before the cluster ask every node whether it has local
//! backends of a service.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use cirri_control::service::HealthCheck;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

use crate::agent::Shared;
use crate::api::HealthCheckInfo;

/// How long a client may take for its question, and how long it may stay.
const PATIENCE: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(60);
/// Clients that a port answers at a time; more of them wait.
const CLIENTS: usize = 32;
/// How long to wait before a port that is somebody else's is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Keeps the ports as services ask for them, until the agent stops.
pub async fn serve(shared: Arc<Shared>) {
    let mut ports = Ports::default();
    loop {
        {
            let mut core = shared.core.lock().await;
            let one = |check: HealthCheck| {
                let HealthCheck { port, service, local_endpoints } = check;
                (port, Check { namespace: service.namespace, service: service.name, local: local_endpoints })
            };
            let wanted = core.serving.sources.health_checks().into_iter().map(one).collect();
            ports.serve(&wanted);
            core.serving.health = ports.status();
        }
        let again =
            async { if ports.has_failed() { tokio::time::sleep(RETRY).await } else { std::future::pending().await } };
        tokio::select! {
            () = shared.health.notified() => {}
            () = again => {}
        }
    }
}

/// What a port answers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Check {
    /// Namespace of the service.
    namespace: String,
    /// Its name.
    service: String,
    /// Ready backends on this node.
    local: usize,
}

/// The ports that answer. Dropping it closes them.
#[derive(Debug, Default)]
struct Ports {
    open: BTreeMap<u16, Port>,
}

#[derive(Debug)]
struct Port {
    check: watch::Sender<Check>,
    /// The task that answers, or why there is none.
    serving: Result<AbortHandle, String>,
}

impl Ports {
    /// Opens, closes and changes ports until exactly these answer. Those that could not be opened are
    /// tried again. Must be called on a `LocalSet`, in the node's network namespace.
    fn serve(&mut self, wanted: &BTreeMap<u16, Check>) {
        self.open.retain(|port, _| wanted.contains_key(port));
        for (number, check) in wanted {
            let port = self
                .open
                .entry(*number)
                .or_insert_with(|| Port { check: watch::Sender::new(check.clone()), serving: Err(String::new()) });
            port.check.send_if_modified(|now| {
                let differs = now != check;
                *now = check.clone();
                differs
            });
            if port.serving.is_err() {
                port.serving = listen(*number).map_err(|error| error.to_string()).map(|listener| {
                    tokio::task::spawn_local(answer_all(listener, port.check.subscribe())).abort_handle()
                });
            }
        }
    }

    /// Whether some port could not be opened.
    fn has_failed(&self) -> bool {
        self.open.values().any(|port| port.serving.is_err())
    }

    /// For `cirri status`.
    fn status(&self) -> Vec<HealthCheckInfo> {
        let one = |(number, port): (&u16, &Port)| {
            let check = port.check.borrow();
            HealthCheckInfo {
                port: *number,
                service: format!("{}/{}", check.namespace, check.service),
                local: check.local,
                error: port.serving.as_ref().err().cloned().unwrap_or_default(),
            }
        };
        self.open.iter().map(one).collect()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Ok(task) = &self.serving {
            task.abort();
        }
    }
}

/// On every address, of both families where the node has both.
fn listen(port: u16) -> io::Result<TcpListener> {
    let both = std::net::TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    let listener = match both {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            std::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?
        }
        other => other?,
    };
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

async fn answer_all(listener: TcpListener, check: watch::Receiver<Check>) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let check = check.clone();
                tokio::task::spawn_local(async move {
                    // Whoever stays longer than this gets no more answers on this connection.
                    let _ = tokio::time::timeout(LONGEST, answer(client, check)).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a health check");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(client: TcpStream, check: watch::Receiver<Check>) {
    let respond = service_fn(|_| {
        let response = response(&check.borrow());
        async { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(client), respond)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a health check broke off");
    }
}

/// As kube-proxy answers.
fn response(check: &Check) -> Response<Full<Bytes>> {
    let quoted = |text: &str| serde_json::Value::from(text);
    let body = format!(
        r#"{{"service":{{"namespace":{},"name":{}}},"localEndpoints":{},"serviceProxyHealthy":true}}"#,
        quoted(&check.namespace),
        quoted(&check.service),
        check.local
    );
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = if check.local > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(WEIGHT, HeaderValue::from(check.local));
    response
}

const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn check(local: usize) -> Check {
        Check { namespace: "shop".to_owned(), service: "web".to_owned(), local }
    }

    async fn ask(port: u16) -> io::Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    #[tokio::test]
    async fn a_port_answers_how_many_local_backends_there_are_until_it_is_not_wanted() {
        let body = async {
            let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let port = taken.local_addr().unwrap().port();
            let mut ports = Ports::default();
            ports.serve(&BTreeMap::from([(port, check(2))]));
            assert!(ports.has_failed() && ports.status()[0].error.contains("in use"), "{:?}", ports.status());
            drop(taken);

            ports.serve(&BTreeMap::from([(port, check(2))]));
            assert!(!ports.has_failed());
            let text = ask(port).await.unwrap();
            assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
            let body = r#"{"service":{"namespace":"shop","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}"#;
            assert!(text.ends_with(body), "{text}");

            ports.serve(&BTreeMap::from([(port, check(0))]));
            assert!(ask(port).await.unwrap().starts_with("HTTP/1.1 503 "));
            ports.serve(&BTreeMap::new());
            tokio::task::yield_now().await;
            assert!(ask(port).await.is_err() && ports.status().is_empty());
        };
        tokio::task::LocalSet::new().run_until(body).await;
    }
}
