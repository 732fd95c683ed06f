//! A server of tens of thousands of connections.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use clap::Args;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::report::{At, Failure, Outcome, event};
use crate::server::Listen;

/// Echoes a few bytes at a time, like an `echo-server`, but on one thread. Prints an event only for a connection that failed.
#[derive(Debug, Clone, Args)]
pub(crate) struct IdleServer {
    #[command(flatten)]
    listen: Listen,
}

impl IdleServer {
    pub(crate) fn run(self) -> Outcome {
        let listener = self.listen.start()?;
        listener.set_nonblocking(true).at("set O_NONBLOCK")?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).at("epoll_create")?;
        let readable = |number| EpollEvent::new(EpollFlags::EPOLLIN, number);
        epoll.add(&listener, readable(LISTENER)).at("epoll_ctl")?;
        let mut streams = HashMap::new();
        let mut events = [EpollEvent::empty(); 256];
        loop {
            let count = epoll
                .wait(&mut events, EpollTimeout::NONE)
                .at("epoll_wait")?;
            for number in events.iter().take(count).map(EpollEvent::data) {
                if number == LISTENER {
                    while let Some(stream) = accept(&listener)? {
                        let number = stream.as_raw_fd().unsigned_abs().into();
                        epoll.add(&stream, readable(number)).at("epoll_ctl")?;
                        streams.insert(number, stream);
                    }
                    continue;
                }
                let Some(stream) = streams.get_mut(&number) else {
                    continue;
                };
                match echo(stream) {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(failure) => event("closed", failure.fields()),
                }
                // This closes it, which removes it from epoll.
                streams.remove(&number);
            }
        }
    }
}

/// The next connection, if one waits.
fn accept(listener: &TcpListener) -> Result<Option<TcpStream>, Failure> {
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(Failure::new("accept", error)),
    };
    stream.set_nonblocking(true).at("set O_NONBLOCK")?;
    stream.set_nodelay(true).at("set TCP_NODELAY")?;
    Ok(Some(stream))
}

/// Echoes what has arrived, and returns whether the client may send more. An answer that does not fit is an error.
fn echo(stream: &mut TcpStream) -> Result<bool, Failure> {
    let mut buffer = [0; 4096];
    let read = match stream.read(&mut buffer) {
        Ok(read) => read,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
        Err(error) => return Err(Failure::new("read", error)),
    };
    stream.write_all(&buffer[..read]).at("write")?;
    Ok(read > 0)
}

/// Stands for the listener; connections have the number of their descriptor.
const LISTENER: u64 = u64::MAX;
