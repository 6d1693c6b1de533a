"""Off-screen pictures of the twin, drawn in software: EGL first, OSMesa where EGL does not work."""

import ctypes
import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onbeat.embodiment.errors import OnbeatError

REMEDY = "run `sudo apt-get install libegl1 libgl1-mesa-dri libosmesa6` (`make run` and `make test` do it when root)"
EGL_PLATFORM_DEVICE = 0x313F
MAX_GEOMS = 200


class RenderUnavailable(OnbeatError):
    """This machine cannot draw: neither EGL nor OSMesa works."""


class Renderer:
    """Draws named cameras of one model. Belongs to the thread that made it, as its OpenGL context does."""

    def __init__(self, model: Any, height: int, width: int) -> None:
        """model: mujoco.MjModel. Raises RenderUnavailable when there is no way to draw."""
        mujoco: Any = importlib.import_module("mujoco")  # compiled, without types
        self._mujoco = mujoco
        self._gl: Any = _open_context(width, height)
        self._scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._model = model
        self._upside_down = np.empty((height, width, 3), np.uint8)

    def draw(self, data: Any, camera: str) -> NDArray[np.uint8]:
        """Draw mujoco.MjData as `camera` sees it: (height, width, 3) uint8 RGB, the caller's own."""
        mujoco = self._mujoco
        self._gl.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._upside_down, None, self._viewport, self._context)
        return np.ascontiguousarray(self._upside_down[::-1])

    def close(self) -> None:
        """Give the context back; closing twice is harmless."""
        if self._gl is None:
            return
        self._gl.make_current()
        self._context.free()
        self._gl.free()
        self._gl = None


def backend() -> str:
    """ "egl" or "osmesa": the one MUJOCO_GL names, else EGL if it works here."""
    named = os.environ.get("MUJOCO_GL", "").lower()
    if named in ("egl", "osmesa"):
        return named
    return "egl" if egl_works() else "osmesa"


def egl_works() -> bool:
    """Whether some EGL device initialises. Asked of the library: PyOpenGL can try only one platform per process."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        query_devices = _egl_function(egl, b"eglQueryDevicesEXT", ctypes.c_int)
        get_display = _egl_function(egl, b"eglGetPlatformDisplayEXT", ctypes.c_void_p)
    except (OSError, AttributeError):
        return False
    devices, count = (ctypes.c_void_p * 8)(), ctypes.c_int(0)
    if not query_devices(8, devices, ctypes.byref(count)):
        return False
    displays = (get_display(EGL_PLATFORM_DEVICE, ctypes.c_void_p(device), None) for device in devices[: count.value])
    return any(egl.eglInitialize(ctypes.c_void_p(display), None, None) for display in displays if display)


def _egl_function(egl: ctypes.CDLL, name: bytes, result: Any) -> Any:
    address = egl.eglGetProcAddress(name)
    if not address:
        raise AttributeError(name)
    return ctypes.CFUNCTYPE(result)(address)


def _open_context(width: int, height: int) -> Any:
    chosen = backend()
    try:
        context = importlib.import_module(f"mujoco.{chosen}").GLContext(width, height)
        context.make_current()
    except (ImportError, AttributeError, RuntimeError, OSError) as failure:
        raise RenderUnavailable(f"cannot draw the twin's cameras with {chosen} ({failure}): {REMEDY}") from failure
    return context
