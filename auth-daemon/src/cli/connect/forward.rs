//! Accepts connections on this machine, and relays each over a stream of its own.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::{
    Target,
    dial::{Dialer, Opened},
    service::Services,
};
use auth_tunnel::{
    Counters,
    hbone::{self, Ended},
};

/// Maximum number of connections at once. Others are refused.
const MAX_CONNECTIONS: usize = 256;
/// How long connections may take to end once the command has ended, and each to tell the server of its end.
const FINISH: Duration = Duration::from_secs(2);
/// Pause after `accept` failed, such as for a lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// What connections are carried to.
pub(super) struct Forward {
    services: Services,
    target: Target,
    dialer: Dialer,
    room: Arc<Semaphore>,
}

impl Forward {
    pub(super) fn new(services: Services, target: Target, dialer: Dialer) -> Self {
        Self {
            services,
            target,
            dialer,
            room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        }
    }

    /// Serves `listener` forever.
    pub(super) async fn serve(self: Arc<Self>, listener: TcpListener) -> Infallible {
        loop {
            let (app, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    eprintln!("auth-daemon: connection cannot be accepted: {error}");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = self.room.clone().try_acquire_owned() else {
                eprintln!(
                    "auth-daemon: connection from {from} refused: there are {MAX_CONNECTIONS} already"
                );
                reset(app);
                continue;
            };
            let forward = self.clone();
            tokio::spawn(async move {
                if let Err(why) = forward.carry(app).await {
                    let Target { service, port } = &forward.target;
                    eprintln!(
                        "auth-daemon: connection from {from} to {service}:{port} failed: {why}"
                    );
                }
                drop(permit);
            });
        }
    }

    /// Waits for the open connections to end, but not for long.
    pub(super) async fn finish(&self) {
        let all = self.room.acquire_many(MAX_CONNECTIONS as u32);
        let _ = timeout(FINISH, all).await;
    }

    async fn open(&self) -> Result<Opened, String> {
        let Target { service, port } = &self.target;
        // Pods come and go.
        let found = self.services.find(service, *port).await;
        let destination = found.map_err(|error| format!("{error:#}"))?;
        self.dialer.open(&destination).await
    }

    async fn carry(&self, mut app: TcpStream) -> Result<(), String> {
        let Opened { mut stream, driver } = match self.open().await {
            Ok(opened) => opened,
            Err(why) => {
                reset(app);
                return Err(why);
            }
        };
        // Without it, small writes are delayed.
        let _ = app.set_nodelay(true);
        let ended = hbone::relay(&mut app, &mut stream, &Counters::default()).await;
        drop(stream);
        // The server must learn how it ended before this process does.
        let _ = timeout(FINISH, driver).await;
        match ended {
            Ended::Clean => Ok(()),
            // The app knows.
            Ended::App(_) => {
                reset(app);
                Ok(())
            }
            ended @ (Ended::Peer(_) | Ended::Broken(_)) => {
                reset(app);
                Err(format!("the server's side: {ended}"))
            }
        }
    }
}

/// Ends a connection by a RST, because an end in order would look like an empty answer.
fn reset(app: TcpStream) {
    let _ = app.set_zero_linger();
}
