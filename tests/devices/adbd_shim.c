/* Preloaded into Debian's adbd, whose wish is to be reached from everywhere, and into what it starts.
 *
 * adbd listens on 127.0.0.1:$ADBD_PORT alone, and on no virtual socket. A program for arm64 is run by $EMULATOR, a
 * script of sh, as the kernel would do it with binfmt_misc: this needs neither root nor a change of the machine. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

int socket(int family, int type, int protocol)
{
    if (family == AF_VSOCK) {
        errno = EAFNOSUPPORT;
        return -1;
    }
    return syscall(SYS_socket, family, type, protocol);
}

int bind(int socket, const struct sockaddr *address, socklen_t length)
{
    in_port_t port = htons(atoi(getenv("ADBD_PORT")));
    if (address->sa_family == AF_INET) {
        struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        return syscall(SYS_bind, socket, &local, sizeof local);
    }
    if (address->sa_family == AF_INET6) { /* ::ffff:127.0.0.1 */
        struct sockaddr_in6 local = {.sin6_family = AF_INET6, .sin6_port = port};
        memcpy(local.sin6_addr.s6_addr + 10, "\xff\xff\x7f\0\0\1", 6);
        return syscall(SYS_bind, socket, &local, sizeof local);
    }
    return syscall(SYS_bind, socket, address, length);
}

static int is_for_arm64(const char *path)
{
    Elf64_Ehdr header;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    int whole = read(file, &header, sizeof header) == sizeof header;
    close(file);
    return whole && memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_machine == EM_AARCH64;
}

int execve(const char *path, char *const arguments[], char *const environment[])
{
    if (!is_for_arm64(path))
        return syscall(SYS_execve, path, arguments, environment);
    int count = 0, kept = 0;
    while (arguments[count])
        count++;
    char *emulated[count + 3];
    emulated[0] = "/bin/sh";
    emulated[1] = getenv("EMULATOR");
    emulated[2] = (char *)path;
    memcpy(emulated + 3, arguments + 1, count * sizeof *emulated); /* with the null at the end */
    while (environment[kept])
        kept++;
    char *without_this[kept + 1];
    char **next = without_this;
    for (char *const *variable = environment; *variable; variable++)
        if (strncmp(*variable, "LD_PRELOAD=", 11) != 0)
            *next++ = *variable;
    *next = NULL;
    return syscall(SYS_execve, "/bin/sh", emulated, without_this);
}
