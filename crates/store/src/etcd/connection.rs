//! One connection at a time, to the first endpoint that works; tried again, elsewhere, until time
//! is up.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prost::Message;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use super::{EtcdOptions, wire};
use crate::StoreError;

/// The endpoints, and the channel that is in use. Cloning shares it.
#[derive(Clone)]
pub(super) struct Connection {
    shared: Arc<Shared>,
}

struct Shared {
    endpoints: Vec<(String, Endpoint)>,
    timeout: Duration,
    current: Mutex<Current>,
}

/// The channel in use. A channel connects, and connects again, by itself.
#[derive(Clone)]
pub(super) struct Current {
    endpoint: usize,
    /// Counts the moves, so that many who see one failure move on only once.
    generation: u64,
    pub(super) channel: Channel,
}

impl Connection {
    pub(super) fn new(options: &EtcdOptions) -> Result<Self, StoreError> {
        let endpoints = options
            .endpoints
            .iter()
            .map(|name| Ok((name.clone(), endpoint(name, options)?)))
            .collect::<Result<Vec<_>, StoreError>>()?;
        let (_, first) = endpoints.first().ok_or(StoreError::NoEndpoints)?;
        let current = Current { endpoint: 0, generation: 0, channel: first.connect_lazy() };
        Ok(Connection {
            shared: Arc::new(Shared { endpoints, timeout: options.request_timeout, current: Mutex::new(current) }),
        })
    }

    pub(super) fn current(&self) -> Current {
        self.lock().clone()
    }

    pub(super) fn name(&self, current: &Current) -> &str {
        &self.shared.endpoints[current.endpoint].0
    }

    pub(super) fn timeout(&self) -> Duration {
        self.shared.timeout
    }

    /// Goes on to the next endpoint, unless someone did since `failed` was taken.
    pub(super) fn move_on(&self, failed: &Current) {
        let mut current = self.lock();
        if current.generation == failed.generation {
            let next = (current.endpoint + 1) % self.shared.endpoints.len();
            *current = Current {
                endpoint: next,
                generation: current.generation + 1,
                channel: self.shared.endpoints[next].1.connect_lazy(),
            };
        }
    }

    /// One call, tried until it is answered or the request time-out is over. Says how many attempts
    /// it took: after more than one, an earlier attempt may have been carried out unseen.
    ///
    /// # Errors
    /// The answer itself, if trying again cannot help; otherwise [`StoreError::Unreachable`].
    pub(super) async fn call<Q, A>(&self, method: &'static str, question: Q) -> Result<(A, u32), CallError>
    where
        Q: Message + Clone + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let started = Instant::now();
        let deadline = started + self.shared.timeout;
        // One attempt must not eat the time of the others.
        let share = self.shared.timeout / (self.shared.endpoints.len() as u32 + 1);
        let mut backoff = Backoff::new();
        let mut attempts = 0;
        let mut last = String::from("no attempt was answered");
        while Instant::now() < deadline {
            attempts += 1;
            let current = self.current();
            let attempt = wire::unary(current.channel.clone(), method, question.clone());
            let until = deadline.min(Instant::now() + share);
            match timeout_at(until, attempt).await {
                Ok(Ok(answer)) => return Ok((answer, attempts)),
                Ok(Err(status)) if !passes(&status) => return Err(CallError::Answer(status)),
                Ok(Err(status)) => last = describe(&status),
                Err(_) => last = format!("{} is silent", self.name(&current)),
            }
            self.move_on(&current);
            sleep(backoff.pause().min(deadline - Instant::now().min(deadline))).await;
        }
        Err(CallError::Unreachable(StoreError::Unreachable {
            endpoints: self.names(),
            waited: started.elapsed(),
            last,
        }))
    }

    pub(super) fn names(&self) -> Vec<String> {
        let names = self.shared.endpoints.iter().map(|(name, _)| name.clone());
        names.collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        // Nothing panics while it is held.
        let current = &self.shared.current;
        current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a call failed.
pub(super) enum CallError {
    /// etcd answered, and will answer so again.
    Answer(Status),
    /// Time is up.
    Unreachable(StoreError),
}

impl CallError {
    pub(super) fn into_store_error(self, what: &'static str) -> StoreError {
        match self {
            CallError::Unreachable(error) => error,
            CallError::Answer(status) => {
                let message = status.message().to_owned();
                match status.code() {
                    Code::ResourceExhausted if message.contains("space") => StoreError::EtcdFull { message },
                    Code::Unauthenticated | Code::PermissionDenied => StoreError::Denied { message },
                    _ => StoreError::Rejected { what, message },
                }
            }
        }
    }
}

/// Pauses between attempts: doubling, with jitter, so that a whole cluster does not come back in
/// step.
pub(super) struct Backoff {
    ceiling: Duration,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Backoff { ceiling: Duration::from_millis(50) }
    }

    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.ceiling.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.ceiling = (self.ceiling * 2).min(Duration::from_secs(2));
        pause
    }
}

/// May the same question get a better answer, here or elsewhere, a little later?
pub(super) fn passes(status: &Status) -> bool {
    match status.code() {
        // No leader, leader changed, server stopping, connection lost.
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => true,
        // "too many requests"; but no space and too large a message stay as they are.
        Code::ResourceExhausted => status.message().contains("too many requests"),
        // What tonic makes of a connection that broke half-way.
        Code::Unknown | Code::Internal => !status.message().starts_with("etcdserver: "),
        _ => false,
    }
}

/// A status with what lies beneath it: "transport error" alone helps nobody.
pub(super) fn describe(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}

fn endpoint(name: &str, options: &EtcdOptions) -> Result<Endpoint, StoreError> {
    let bad = |reason: &str| StoreError::BadEndpoint { endpoint: name.to_owned(), reason: reason.to_owned() };
    let url = match name.split_once("://") {
        None => format!("http://{name}"),
        Some(("http", _)) => name.to_owned(),
        Some(("https", _)) => return Err(bad("TLS to etcd is not built in yet")),
        Some(_) => return Err(bad("the scheme is not http")),
    };
    let endpoint = Endpoint::from_shared(url).map_err(|error| bad(&error.to_string()))?;
    if endpoint.uri().port().is_none() {
        return Err(bad("the port is missing"));
    }
    Ok(endpoint
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        // etcd counts pings more often than every five seconds as abuse.
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true))
}
