//! The plugin's side: registers with the runtime, and answers its calls.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, MethodHandler, Server, Service, TtrpcContext};
use ttrpc::proto::{Code, Request, Response};

use crate::messages::{
    Configure, Configured, PodSandbox, RUN_POD_SANDBOX, RegisterPlugin, RunPodSandbox, StateChange,
    Synchronize, Synchronized,
};
use crate::mux::Connections;
use crate::{Error, Sandbox, Starting, wait};

/// Serves the runtime's calls and registers. Returns only if that fails.
pub(crate) async fn serve(
    connections: Connections,
    deadline: Duration,
    starting: mpsc::Sender<Starting>,
) -> Error {
    let plugin = Arc::new(Plugin {
        deadline,
        limit: AtomicU64::new(REQUEST_TIMEOUT.as_millis() as u64 / 2),
        starting,
    });
    let methods = [
        ("Configure", Method::Configure),
        ("Synchronize", Method::Synchronize),
        ("RunPodSandbox", Method::RunPodSandbox),
        ("StateChange", Method::StateChange),
        ("Shutdown", Method::Other),
    ];
    let methods = methods.map(|(name, method)| {
        let handler = Handler {
            plugin: plugin.clone(),
            method,
        };
        (
            name.to_owned(),
            Box::new(handler) as Box<dyn MethodHandler + Send + Sync>,
        )
    });
    let service = Service {
        methods: HashMap::from(methods),
        streams: HashMap::new(),
    };
    // The one connection, and then no other: a listener that ends would end the server.
    let only = stream::once(async { Ok(connections.plugin) }).chain(stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(only))
        .register_service(HashMap::from([(
            "nri.pkg.api.v1alpha1.Plugin".to_owned(),
            service,
        )]));
    if let Err(error) = server.start().await {
        return Error::Register(error.to_string());
    }
    let client = Client::new(Socket::new(connections.runtime));
    let request = Request {
        service: "nri.pkg.api.v1alpha1.Runtime".to_owned(),
        method: "RegisterPlugin".to_owned(),
        payload: RegisterPlugin {
            name: "auth-daemon".to_owned(),
            index: INDEX.to_owned(),
        }
        .encode_to_vec(),
        timeout_nano: REGISTRATION_TIMEOUT.as_nanos() as i64,
        ..Request::default()
    };
    if let Err(error) = client.request(request).await {
        return Error::Register(error.to_string());
    }
    // Both ends live until the socket ends, which the caller notices.
    std::future::pending().await
}

#[derive(Debug)]
struct Plugin {
    deadline: Duration,
    /// Milliseconds after which an answer might come too late for the runtime.
    limit: AtomicU64,
    starting: mpsc::Sender<Starting>,
}

impl Plugin {
    async fn starts(&self, pod: Option<PodSandbox>) {
        let Some(pod) = pod else {
            return;
        };
        let sandbox = Sandbox {
            uid: pod.uid,
            namespace: pod.namespace,
            name: pod.name,
        };
        let limit = self
            .deadline
            .min(Duration::from_millis(self.limit.load(Ordering::Relaxed)));
        let (ready, waiting) = oneshot::channel();
        let started = Starting {
            sandbox: sandbox.clone(),
            ready,
        };
        // Full: so many wait that this one would be too late.
        let asked = self.starting.try_send(started).is_ok();
        if !asked || !wait(waiting, limit).await {
            warn!(
                pod = %format_args!("{}/{}", sandbox.namespace, sandbox.name),
                uid = sandbox.uid,
                "pod starts before the daemon has decided about it"
            );
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Method {
    Configure,
    Synchronize,
    RunPodSandbox,
    StateChange,
    Other,
}

#[derive(Debug)]
struct Handler {
    plugin: Arc<Plugin>,
    method: Method,
}

#[async_trait]
impl MethodHandler for Handler {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let payload = request.payload.as_slice();
        let answer = match self.method {
            Method::Configure => {
                let configure: Configure = read(payload)?;
                if let Ok(timeout @ 1..) = u64::try_from(configure.request_timeout) {
                    self.plugin.limit.store(timeout / 2, Ordering::Relaxed);
                }
                info!(
                    runtime = %format_args!("{} {}", printable(&configure.runtime_name), printable(&configure.runtime_version)),
                    "container runtime asks before it starts pods"
                );
                let events = 1 << (RUN_POD_SANDBOX - 1);
                Configured { events }.encode_to_vec()
            }
            Method::Synchronize => {
                let Synchronize { more } = read(payload)?;
                Synchronized { more }.encode_to_vec()
            }
            Method::RunPodSandbox => {
                let RunPodSandbox { pod } = read(payload)?;
                self.plugin.starts(pod).await;
                Vec::new()
            }
            Method::StateChange => {
                let StateChange { event, pod } = read(payload)?;
                if event == RUN_POD_SANDBOX {
                    self.plugin.starts(pod).await;
                }
                Vec::new()
            }
            Method::Other => Vec::new(),
        };
        let mut response = Response::new();
        response.set_status(ttrpc::get_status(Code::OK, ""));
        response.payload = answer;
        Ok(response)
    }
}

fn read<M: Message + Default>(payload: &[u8]) -> ttrpc::Result<M> {
    M::decode(payload).map_err(|error| {
        ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INVALID_ARGUMENT, error.to_string()))
    })
}

fn printable(text: &str) -> String {
    text.chars()
        .filter(|one| !one.is_control())
        .take(64)
        .collect()
}

/// Before plugins that look at containers, of which the daemon needs none.
const INDEX: &str = "05";
/// How long the runtime may take to accept the plugin.
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(5);
/// The runtimes' own default for the time in which a plugin must answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::mux;

    /// The runtime's side of the socket.
    struct Runtime {
        plugin: Client,
        registered: mpsc::Receiver<RegisterPlugin>,
    }

    #[derive(Debug)]
    struct Registration(mpsc::Sender<RegisterPlugin>);

    #[async_trait]
    impl MethodHandler for Registration {
        async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
            self.0.send(read(&request.payload)?).await.unwrap();
            let mut response = Response::new();
            response.set_status(ttrpc::get_status(Code::OK, ""));
            Ok(response)
        }
    }

    impl Runtime {
        async fn start(deadline: Duration) -> (Self, mpsc::Receiver<Starting>) {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (sender, starting) = mpsc::channel(1);
            let (connections, carried) = mux::split(ours);
            tokio::spawn(carried);
            tokio::spawn(serve(connections, deadline, sender));
            let (connections, carried) = mux::split(theirs);
            tokio::spawn(carried);
            let (sender, registered) = mpsc::channel(1);
            let method: Box<dyn MethodHandler + Send + Sync> = Box::new(Registration(sender));
            let service = Service {
                methods: HashMap::from([("RegisterPlugin".to_owned(), method)]),
                streams: HashMap::new(),
            };
            let only = stream::once(async { Ok(connections.runtime) }).chain(stream::pending());
            let name = "nri.pkg.api.v1alpha1.Runtime".to_owned();
            let mut server = Server::new()
                .add_listener(Listener::new(only))
                .register_service(HashMap::from([(name, service)]));
            server.start().await.unwrap();
            // It ends with its last handle.
            std::mem::forget(server);
            let runtime = Self {
                plugin: Client::new(Socket::new(connections.plugin)),
                registered,
            };
            (runtime, starting)
        }

        async fn call<A: Message + Default>(&self, method: &str, message: &impl Message) -> A {
            let request = Request {
                service: "nri.pkg.api.v1alpha1.Plugin".to_owned(),
                method: method.to_owned(),
                payload: message.encode_to_vec(),
                timeout_nano: Duration::from_secs(20).as_nanos() as i64,
                ..Request::default()
            };
            let response = self.plugin.request(request).await.unwrap();
            A::decode(response.payload.as_slice()).unwrap()
        }
    }

    fn pod() -> Option<PodSandbox> {
        Some(PodSandbox {
            name: "web-0".to_owned(),
            uid: "f00d".to_owned(),
            namespace: "shop".to_owned(),
        })
    }

    #[tokio::test]
    async fn registers_and_subscribes_to_the_start_of_pods() {
        let (mut runtime, _starting) = Runtime::start(Duration::from_secs(1)).await;
        let registered = runtime.registered.recv().await.unwrap();
        assert_eq!(
            (&*registered.name, &*registered.index),
            ("auth-daemon", "05")
        );
        let configured: Configured = runtime.call("Configure", &Configure::default()).await;
        assert_eq!(configured.events, 1);
        for more in [true, false] {
            let answer: Synchronized = runtime.call("Synchronize", &Synchronize { more }).await;
            assert_eq!(answer.more, more);
        }
    }

    #[tokio::test]
    async fn holds_a_pod_until_it_is_ready() {
        let (runtime, mut starting) = Runtime::start(Duration::from_secs(20)).await;
        let configure = Configure {
            request_timeout: 40_000,
            ..Configure::default()
        };
        let _: Configured = runtime.call("Configure", &configure).await;
        let old = StateChange {
            event: RUN_POD_SANDBOX,
            pod: pod(),
        };
        let new = RunPodSandbox { pod: pod() };
        for old_protocol in [true, false] {
            let call = async {
                if old_protocol {
                    runtime.call::<()>("StateChange", &old).await;
                } else {
                    runtime.call::<()>("RunPodSandbox", &new).await;
                }
            };
            tokio::pin!(call);
            let started = tokio::select! {
                () = &mut call => panic!("the pod was not held"),
                started = starting.recv() => started.unwrap(),
            };
            assert_eq!(
                (&*started.sandbox.uid, &*started.sandbox.name),
                ("f00d", "web-0")
            );
            tokio::select! {
                () = &mut call => panic!("the pod was not held"),
                () = sleep(Duration::from_millis(100)) => {}
            }
            started.ready.send(()).unwrap();
            call.await;
        }
    }

    #[tokio::test]
    async fn lets_a_pod_start_at_the_deadline_and_before_the_runtime_loses_patience() {
        for (deadline, request_timeout) in [
            (Duration::from_millis(50), 40_000),
            (Duration::from_secs(20), 100),
        ] {
            let (runtime, mut starting) = Runtime::start(deadline).await;
            let configure = Configure {
                request_timeout,
                ..Configure::default()
            };
            let _: Configured = runtime.call("Configure", &configure).await;
            let begin = Instant::now();
            let call = async {
                runtime
                    .call::<()>("RunPodSandbox", &RunPodSandbox { pod: pod() })
                    .await
            };
            let ((), held) = tokio::join!(call, starting.recv());
            assert!(begin.elapsed() < Duration::from_secs(10));
            drop(held);
        }
    }

    #[tokio::test]
    async fn refuses_what_is_no_message() {
        let (runtime, _starting) = Runtime::start(Duration::from_secs(1)).await;
        let request = Request {
            service: "nri.pkg.api.v1alpha1.Plugin".to_owned(),
            method: "RunPodSandbox".to_owned(),
            payload: vec![0xff; 7],
            ..Request::default()
        };
        assert!(runtime.plugin.request(request).await.is_err());
    }
}
