//! What a container runtime sends, with the names that pods chose in it: never a panic, and an end foreverything.

use std::{sync::LazyLock, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    runtime::Runtime,
    sync::mpsc,
    time::timeout,
};

use super::LONG;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a folder"));
static SOCKET: LazyLock<UnixListener> = LazyLock::new(|| {
    let _runtime = RUNTIME.enter();
    UnixListener::bind(FOLDER.path().join("nri.sock")).expect("a socket")
});

pub(super) fn run(bytes: &[u8]) {
    let path = FOLDER.path().join("nri.sock");
    let socket = &*SOCKET;
    let runtime = async {
        let (mut stream, _) = socket.accept().await.expect("the plugin connects");
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    };
    let (starting, mut started) = mpsc::channel(16);
    let plugin = async {
        let served = auth_nri::serve(&path, Duration::ZERO, starting).await;
        let Err(error) = served;
        assert!(
            !error.to_string().chars().any(char::is_control),
            "{error:?}"
        );
    };
    let both = async {
        timeout(LONG, async { tokio::join!(runtime, plugin) })
            .await
            .expect("an end");
        while started.try_recv().is_ok() {}
    };
    RUNTIME.block_on(both);
}
